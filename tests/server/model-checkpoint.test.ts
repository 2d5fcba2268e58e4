import assert from 'node:assert/strict';
import { mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { readCheckpoint } from '../../server/model/checkpoint.js';
import { FIXTURES, POCKET_R1 } from '../helpers/checkpoint-copy.js';

test('pocket-r1: spec, tensors, defaults', () => {
  const checkpoint = readCheckpoint(POCKET_R1);
  const { spec, tensors } = checkpoint;
  assert.equal(checkpoint.name, 'pocket-r1');
  assert.deepEqual(checkpoint.defaults, { doSample: true, temperature: 0.6, topP: 0.95, eosTokenIds: [1] });
  assert.equal(checkpoint.bosTokenId, 0);
  assert.deepEqual(checkpoint.notes, []);
  assert.match(checkpoint.fingerprint, /^[0-9a-f]{64}$/);
  assert.deepEqual(spec, {
    modelType: 'deepseek_v3',
    vocabSize: 1024,
    hiddenSize: 256,
    intermediateSize: 512,
    moeIntermediateSize: 128,
    numHiddenLayers: 6,
    numAttentionHeads: 4,
    numSharedExperts: 1,
    numRoutedExperts: 16,
    numExpertsPerToken: 4,
    numExpertGroups: 4,
    topkGroups: 2,
    topkMethod: 'noaux_tc',
    scoringFunc: 'sigmoid',
    normTopkProb: true,
    routedScalingFactor: 2.5,
    firstKDenseReplace: 1,
    moeLayerFreq: 1,
    kvLoraRank: 512,
    qLoraRank: 128,
    qkNopeHeadDim: 64,
    qkRopeHeadDim: 64,
    vHeadDim: 64,
    numKeyValueHeads: 0,
    headDim: 0,
    attentionBias: false,
    mlpBias: false,
    maxPositionEmbeddings: 4096,
    rmsNormEps: 1e-6,
    ropeTheta: 10000,
    ropeInterleave: true,
    yarn: null,
    llama3: null,
    ropeLinearFactor: 1,
    tieWordEmbeddings: false,
    numMtpLayers: 1,
    weightBlockSize: [128, 128],
  });
  assert.equal(tensors.length, 737);
  const weight = tensors.find(({ name }) => name === 'model.layers.0.self_attn.o_proj.weight')!;
  assert.deepEqual(weight, {
    name: 'model.layers.0.self_attn.o_proj.weight',
    dtype: 'F8_E4M3',
    shape: [256, 256],
    file: join(POCKET_R1, 'model.safetensors'),
    offset: 8 + 85600 + 3233376,
    bytes: 65536,
  });
  assert.equal(
    checkpoint.weightBytes,
    tensors.reduce((sum, { bytes }) => sum + bytes, 0),
  );
});

test('the other fixtures: BF16 and F16 and F32, tied embeddings, V2 routing, YaRN, ragged block scales', () => {
  const v2 = readCheckpoint(join(FIXTURES, 'v2-lite-bf16'));
  assert.equal(v2.spec.weightBlockSize, null);
  assert.equal(v2.spec.qLoraRank, 0);
  assert.deepEqual([v2.spec.topkMethod, v2.spec.scoringFunc], ['greedy', 'softmax']);
  assert.deepEqual(v2.spec.yarn, {
    factor: 40,
    betaFast: 32,
    betaSlow: 1,
    mscale: 0.707,
    mscaleAllDim: 0.707,
    originalMaxPositionEmbeddings: 64,
  });
  const tied = readCheckpoint(join(FIXTURES, 'odd-f16-tied'));
  assert.ok(tied.spec.tieWordEmbeddings && !tied.tensors.some(({ name }) => name === 'lm_head.weight'));
  assert.ok(tied.tensors.some(({ dtype }) => dtype === 'F16'));
  const group = readCheckpoint(join(FIXTURES, 'odd-v2-group'));
  assert.deepEqual([group.spec.topkMethod, group.tensors[0]!.dtype], ['group_limited_greedy', 'F32']);
  const ragged = readCheckpoint(join(FIXTURES, 'odd-fp8'));
  const scale = ragged.tensors.find(({ name }) => name === 'model.layers.0.mlp.gate_proj.weight_scale_inv')!;
  assert.deepEqual(scale.shape, [3, 2]);
  assert.notEqual(ragged.fingerprint, group.fingerprint);
});

test('a V3-sized checkpoint of 91,000 tensors is read in a few times the time of parsing its headers', () => {
  const folder = mkdtempSync(join(tmpdir(), 'rodin-v3-'));
  try {
    const [layers, experts, numShards] = [61, 256, 163];
    const names = new Map<string, [number, number]>(); // name -> [rows, columns], one element a tensor
    const linear = (name: string) => {
      names.set(`${name}.weight`, [1, 1]);
      names.set(`${name}.weight_scale_inv`, [1, 1]);
    };
    for (let layer = 0; layer < layers; layer++) {
      const prefix = `model.layers.${layer}.`;
      for (const name of ['q_a_proj', 'q_b_proj', 'kv_a_proj_with_mqa', 'kv_b_proj', 'o_proj']) {
        linear(`${prefix}self_attn.${name}`);
      }
      for (const part of layer < 3
        ? ['mlp']
        : ['mlp.shared_experts', ...Array.from({ length: experts }, (_, e) => `mlp.experts.${e}`)]) {
        for (const name of ['gate_proj', 'up_proj', 'down_proj']) linear(`${prefix}${part}.${name}`);
      }
    }
    assert.ok(names.size > 89_000);
    writeSizedCheckpoint(folder, [...names.keys()], layers, experts, numShards);
    const start = performance.now();
    const checkpoint = readCheckpoint(folder);
    const elapsed = performance.now() - start;
    assert.ok(checkpoint.tensors.length > 90_000, `${checkpoint.tensors.length}`);
    // Against the machine's own speed at this moment: bare parsing of the same text.
    const startBare = performance.now();
    for (const file of readdirSync(folder)) {
      const bytes = readFileSync(join(folder, file));
      if (file.endsWith('.json')) JSON.parse(bytes.toString());
      else JSON.parse(bytes.subarray(8, 8 + Number(bytes.readBigUInt64LE())).toString());
    }
    const bare = performance.now() - startBare;
    assert.ok(elapsed < 8 * bare, `${elapsed} ms, ${bare} ms for bare parsing`);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
});

/** Every dimension is 1 but the experts', so that the files stay small while their headers are as large as V3's. */
function writeSizedCheckpoint(
  folder: string,
  fp8Names: string[],
  layers: number,
  experts: number,
  numShards: number,
): void {
  mkdirSync(folder, { recursive: true });
  const config = {
    model_type: 'deepseek_v3',
    vocab_size: 1,
    hidden_size: 1,
    intermediate_size: 1,
    moe_intermediate_size: 1,
    num_hidden_layers: layers,
    num_attention_heads: 1,
    n_shared_experts: 1,
    n_routed_experts: experts,
    num_experts_per_tok: 1,
    n_group: 1,
    topk_group: 1,
    norm_topk_prob: true,
    routed_scaling_factor: 1,
    first_k_dense_replace: 3,
    kv_lora_rank: 1,
    q_lora_rank: 1,
    qk_nope_head_dim: 1,
    qk_rope_head_dim: 2,
    v_head_dim: 1,
    max_position_embeddings: 16,
    quantization_config: { quant_method: 'fp8', weight_block_size: [128, 128] },
  };
  writeFileSync(join(folder, 'config.json'), JSON.stringify(config));
  const shapeOf = (name: string): number[] => {
    if (name.endsWith('weight_scale_inv')) return [1, 1];
    if (name.includes('q_b_proj')) return [3, 1];
    if (name.includes('kv_a_proj')) return [3, 1];
    if (name.includes('kv_b_proj')) return [2, 1];
    return [1, 1];
  };
  const tensors: [string, string, number[]][] = fp8Names.map((name) => [
    name,
    name.endsWith('weight') ? 'F8_E4M3' : 'F32',
    shapeOf(name),
  ]);
  for (let layer = 0; layer < layers; layer++) {
    const prefix = `model.layers.${layer}.`;
    for (const name of [
      'input_layernorm',
      'post_attention_layernorm',
      'self_attn.q_a_layernorm',
      'self_attn.kv_a_layernorm',
    ]) {
      tensors.push([`${prefix}${name}.weight`, 'BF16', [1]]);
    }
    if (layer < 3) continue;
    tensors.push([`${prefix}mlp.gate.weight`, 'BF16', [experts, 1]]);
    tensors.push([`${prefix}mlp.gate.e_score_correction_bias`, 'F32', [experts]]);
  }
  for (const name of ['model.embed_tokens.weight', 'lm_head.weight']) tensors.push([name, 'BF16', [1, 1]]);
  tensors.push(['model.norm.weight', 'BF16', [1]]);
  const weightMap: Record<string, string> = {};
  const perShard = Math.ceil(tensors.length / numShards);
  for (let shard = 0; shard < numShards; shard++) {
    const file = `model-${String(shard + 1).padStart(5, '0')}-of-${String(numShards).padStart(6, '0')}.safetensors`;
    const header: Record<string, unknown> = {};
    let end = 0;
    for (const [name, dtype, shape] of tensors.slice(shard * perShard, (shard + 1) * perShard)) {
      const begin = end;
      end += shape.reduce((a, b) => a * b, 1) * { F8_E4M3: 1, BF16: 2, F32: 4 }[dtype]!;
      header[name] = { dtype, shape, data_offsets: [begin, end] };
      weightMap[name] = file;
    }
    const text = Buffer.from(JSON.stringify(header));
    const prefix = Buffer.alloc(8);
    prefix.writeBigUInt64LE(BigInt(text.length));
    writeFileSync(join(folder, file), Buffer.concat([prefix, text, Buffer.alloc(end)]));
  }
  writeFileSync(join(folder, 'model.safetensors.index.json'), JSON.stringify({ weight_map: weightMap }));
}
