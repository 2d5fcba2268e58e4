/** A deepseek_v2 or deepseek_v3 model as llama.cpp's architecture "deepseek2": its tensors' names, shapes and keys. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import type { ModelSpec } from '../../server/model/spec.js';
import { decoderTensors, isMoeLayer } from '../../server/model/tensor-table.js';
import { writeGguf, type GgufTensor, type GgufType, type GgufValue } from './gguf.js';

/** Where values come from: a checkpoint, or random numbers. */
export interface TensorSource {
  /** values of the checkpoint's tensor in row order, block scales applied, in pieces that divide by 32 */
  pieces(name: string, shape: readonly number[]): Iterable<Float32Array>;
}

export interface GgufOptions {
  /** of the linear layers and the embedding; norms and the router stay float32 */
  type: 'BF16' | 'Q8_0';
  /** W_UK and W_UV in float32: with AMX, llama.cpp fails on other types there */
  hasFloatKvB: boolean;
  /** whose tokenizer.json goes in; null: none, for tests with random token ids */
  folder: string | null;
}

const LAYER_NAMES: Record<string, string> = {
  'input_layernorm.weight': 'attn_norm.weight',
  'self_attn.q_proj.weight': 'attn_q.weight',
  'self_attn.q_a_proj.weight': 'attn_q_a.weight',
  'self_attn.q_a_layernorm.weight': 'attn_q_a_norm.weight',
  'self_attn.q_b_proj.weight': 'attn_q_b.weight',
  'self_attn.kv_a_proj_with_mqa.weight': 'attn_kv_a_mqa.weight',
  'self_attn.kv_a_layernorm.weight': 'attn_kv_a_norm.weight',
  'self_attn.o_proj.weight': 'attn_output.weight',
  'post_attention_layernorm.weight': 'ffn_norm.weight',
  'mlp.gate_proj.weight': 'ffn_gate.weight',
  'mlp.up_proj.weight': 'ffn_up.weight',
  'mlp.down_proj.weight': 'ffn_down.weight',
  'mlp.gate.weight': 'ffn_gate_inp.weight',
  'mlp.gate.e_score_correction_bias': 'exp_probs_b.bias',
  'mlp.shared_experts.gate_proj.weight': 'ffn_gate_shexp.weight',
  'mlp.shared_experts.up_proj.weight': 'ffn_up_shexp.weight',
  'mlp.shared_experts.down_proj.weight': 'ffn_down_shexp.weight',
};
const OTHER_NAMES: Record<string, string> = {
  'model.embed_tokens.weight': 'token_embd.weight',
  'model.norm.weight': 'output_norm.weight',
  'lm_head.weight': 'output.weight',
};
const SIGMOID = 2;
const SOFTMAX = 1;
const TOKEN_NORMAL = 1;
const TOKEN_CONTROL = 3;
const TOKEN_UNUSED = 5;

export function writeDeepseek2(file: string, spec: ModelSpec, source: TensorSource, options: GgufOptions): void {
  if (spec.yarn !== null || spec.ropeLinearFactor !== 1) throw new Error('Stretched positions are not written.');
  const tensors = decoderTensors(spec)
    .filter(({ name }) => !name.includes('.mlp.experts.'))
    .flatMap(({ name, shape }) =>
      name.endsWith('.kv_b_proj.weight') ? splitKvB(name, spec, source, options) : one(name, shape, source, options),
    );
  for (let layer = 0; layer < spec.numHiddenLayers; layer++) {
    if (isMoeLayer(spec, layer)) tensors.push(...experts(layer, spec, source, options));
  }
  writeGguf(file, metadataOf(spec, options.folder), tensors);
}

function one(name: string, shape: number[], source: TensorSource, options: GgufOptions): GgufTensor {
  const [, layer, rest] = /^model\.layers\.(\d+)\.(.*)$/.exec(name) ?? [];
  const suffix = rest === undefined ? OTHER_NAMES[name] : LAYER_NAMES[rest];
  if (suffix === undefined) throw new Error(`llama.cpp's deepseek2 has no place for ${name}.`);
  const isSmall = shape.length === 1 || rest === 'mlp.gate.weight';
  return {
    name: layer === undefined ? suffix : `blk.${layer}.${suffix}`,
    type: isSmall ? 'F32' : options.type,
    shape,
    values: () => source.pieces(name, shape),
  };
}

/** kv_b_proj [heads, nope + v, rank] -> W_UK transposed [heads, rank, nope] and W_UV [heads, v, rank] */
function splitKvB(name: string, spec: ModelSpec, source: TensorSource, options: GgufOptions): GgufTensor[] {
  const { numAttentionHeads: heads, qkNopeHeadDim: nope, vHeadDim: v, kvLoraRank: rank } = spec;
  const layer = /layers\.(\d+)\./.exec(name)![1]!;
  const type: GgufType = options.hasFloatKvB ? 'F32' : options.type;
  const all = (): Float32Array => concat(source.pieces(name, [heads * (nope + v), rank]), heads * (nope + v) * rank);
  function* keys(): Iterable<Float32Array> {
    const kvB = all(); // [heads, nope + v, rank]
    const out = new Float32Array(heads * rank * nope); // [heads, rank, nope]
    for (let head = 0; head < heads; head++) {
      for (let row = 0; row < nope; row++) {
        const from = (head * (nope + v) + row) * rank;
        for (let at = 0; at < rank; at++) out[(head * rank + at) * nope + row] = kvB[from + at]!;
      }
    }
    yield out;
  }
  function* values(): Iterable<Float32Array> {
    const kvB = all();
    for (let head = 0; head < heads; head++) {
      const first = head * (nope + v) + nope;
      yield kvB.subarray(first * rank, (first + v) * rank);
    }
  }
  return [
    { name: `blk.${layer}.attn_k_b.weight`, type, shape: [heads, rank, nope], values: keys },
    { name: `blk.${layer}.attn_v_b.weight`, type, shape: [heads, v, rank], values },
  ];
}

/** all experts of a layer in one tensor */
function experts(layer: number, spec: ModelSpec, source: TensorSource, options: GgufOptions): GgufTensor[] {
  const { numRoutedExperts, moeIntermediateSize: width, hiddenSize: hidden } = spec;
  return (['gate', 'up', 'down'] as const).map((which) => {
    const shape = which === 'down' ? [hidden, width] : [width, hidden];
    function* values(): Iterable<Float32Array> {
      for (let expert = 0; expert < numRoutedExperts; expert++) {
        yield* source.pieces(`model.layers.${layer}.mlp.experts.${expert}.${which}_proj.weight`, shape);
      }
    }
    const name = `blk.${layer}.ffn_${which}_exps.weight`;
    return { name, type: options.type, shape: [numRoutedExperts, ...shape], values };
  });
}

function concat(pieces: Iterable<Float32Array>, count: number): Float32Array {
  const out = new Float32Array(count);
  let at = 0;
  for (const piece of pieces) {
    out.set(piece, at);
    at += piece.length;
  }
  return out;
}

function metadataOf(spec: ModelSpec, folder: string | null): Map<string, GgufValue> {
  const numbers: Record<string, number> = {
    vocab_size: spec.vocabSize,
    context_length: spec.maxPositionEmbeddings,
    embedding_length: spec.hiddenSize,
    block_count: spec.numHiddenLayers,
    leading_dense_block_count: spec.firstKDenseReplace,
    feed_forward_length: spec.intermediateSize,
    expert_feed_forward_length: spec.moeIntermediateSize,
    expert_count: spec.numRoutedExperts,
    expert_used_count: spec.numExpertsPerToken,
    expert_shared_count: spec.numSharedExperts,
    expert_group_count: spec.numExpertGroups,
    expert_group_used_count: spec.topkGroups,
    expert_gating_func: spec.scoringFunc === 'sigmoid' ? SIGMOID : SOFTMAX,
    'attention.head_count': spec.numAttentionHeads,
    // latents are the one key and value head that all query heads share
    'attention.head_count_kv': 1,
    'attention.key_length': spec.kvLoraRank + spec.qkRopeHeadDim,
    'attention.value_length': spec.kvLoraRank,
    'attention.key_length_mla': spec.qkNopeHeadDim + spec.qkRopeHeadDim,
    'attention.value_length_mla': spec.vHeadDim,
    // 0 where queries have no latent: slices of any depth must say so
    'attention.q_lora_rank': spec.qLoraRank,
    'attention.kv_lora_rank': spec.kvLoraRank,
    'rope.dimension_count': spec.qkRopeHeadDim,
  };
  return new Map<string, GgufValue>([
    ['general.architecture', { string: 'deepseek2' }],
    ...Object.entries(numbers).map(([key, value]) => [`deepseek2.${key}`, { uint32: value }] as const),
    ['deepseek2.attention.layer_norm_rms_epsilon', { float32: spec.rmsNormEps }],
    ['deepseek2.rope.freq_base', { float32: spec.ropeTheta }],
    ['deepseek2.expert_weights_scale', { float32: spec.routedScalingFactor }],
    ['deepseek2.expert_weights_norm', { bool: spec.normTopkProb }],
    ...tokenizerOf(folder, spec.vocabSize),
  ]);
}

interface TokenizerFile {
  model: { vocab: Record<string, number>; merges: [string, string][] };
  added_tokens: { id: number; content: string; special: boolean }[];
}

function tokenizerOf(folder: string | null, vocabSize: number): [string, GgufValue][] {
  if (folder === null) return [['tokenizer.ggml.model', { string: 'none' }]];
  const { model, added_tokens } = JSON.parse(readFileSync(join(folder, 'tokenizer.json'), 'utf8')) as TokenizerFile;
  const tokens = Array.from({ length: vocabSize }, (_, id) => `[unused ${id}]`);
  const types = tokens.map(() => TOKEN_UNUSED);
  for (const [token, id] of Object.entries(model.vocab)) {
    tokens[id] = token;
    types[id] = TOKEN_NORMAL;
  }
  for (const { id, content } of added_tokens) {
    tokens[id] = content;
    types[id] = TOKEN_CONTROL;
  }
  const merges = model.merges.map((pair) => pair.join(' '));
  return [
    ['tokenizer.ggml.model', { string: 'gpt2' }],
    ['tokenizer.ggml.pre', { string: 'deepseek-v3' }],
    ['tokenizer.ggml.tokens', { strings: tokens }],
    ['tokenizer.ggml.token_type', { int32s: types }],
    ['tokenizer.ggml.merges', { strings: merges }],
    ['tokenizer.ggml.bos_token_id', { uint32: 0 }],
    ['tokenizer.ggml.eos_token_id', { uint32: 1 }],
  ];
}
