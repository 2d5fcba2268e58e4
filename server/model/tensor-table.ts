import { isGqa } from './gqa-config.js';
import type { ModelSpec } from './spec.js';

/** A tensor that a checkpoint of some spec must hold. */
export interface ExpectedTensor {
  name: string;
  shape: number[];
  /** may be FP8, with block scales beside it */
  canBeFp8: boolean;
  /** may be absent: the MTP module then shares the decoder's */
  isOptional?: boolean;
}

/** Layers from numHiddenLayers on are MTP modules, which have experts wherever the decoder has some. */
export function isMoeLayer(spec: ModelSpec, layer: number): boolean {
  if (spec.numRoutedExperts === 0) return false;
  if (layer >= spec.numHiddenLayers) return true;
  return layer >= spec.firstKDenseReplace && layer % spec.moeLayerFreq === 0;
}

/** Every tensor of the embedding, the decoder layers and the head. */
export function decoderTensors(spec: ModelSpec): ExpectedTensor[] {
  const table = [plain('model.embed_tokens.weight', spec.vocabSize, spec.hiddenSize)];
  for (let layer = 0; layer < spec.numHiddenLayers; layer++) addLayer(table, spec, layer);
  table.push(plain('model.norm.weight', spec.hiddenSize));
  if (!spec.tieWordEmbeddings) table.push(plain('lm_head.weight', spec.vocabSize, spec.hiddenSize));
  return table;
}

/** Every tensor of MTP module `index`, which the hub's layout puts behind the decoder layers. */
export function mtpTensors(spec: ModelSpec, index: number): ExpectedTensor[] {
  const layer = spec.numHiddenLayers + index;
  const prefix = `model.layers.${layer}.`;
  const table = [
    plain(`${prefix}enorm.weight`, spec.hiddenSize),
    plain(`${prefix}hnorm.weight`, spec.hiddenSize),
    linear(`${prefix}eh_proj`, spec.hiddenSize, 2 * spec.hiddenSize),
    plain(`${prefix}shared_head.norm.weight`, spec.hiddenSize),
    { ...plain(`${prefix}shared_head.head.weight`, spec.vocabSize, spec.hiddenSize), isOptional: true },
    { ...plain(`${prefix}embed_tokens.weight`, spec.vocabSize, spec.hiddenSize), isOptional: true },
  ];
  addLayer(table, spec, layer);
  return table;
}

function plain(name: string, ...shape: number[]): ExpectedTensor {
  return { name, shape, canBeFp8: false };
}

function linear(name: string, rows: number, columns: number): ExpectedTensor {
  return { name: `${name}.weight`, shape: [rows, columns], canBeFp8: true };
}

function addLayer(table: ExpectedTensor[], spec: ModelSpec, layer: number): void {
  const prefix = `model.layers.${layer}.`;
  table.push(plain(`${prefix}input_layernorm.weight`, spec.hiddenSize));
  if (isGqa(spec.modelType)) addGqa(table, spec, `${prefix}self_attn.`);
  else addMla(table, spec, `${prefix}self_attn.`);
  table.push(plain(`${prefix}post_attention_layernorm.weight`, spec.hiddenSize));
  if (!isMoeLayer(spec, layer)) {
    addMlp(table, `${prefix}mlp.`, spec.hiddenSize, spec.intermediateSize, spec.mlpBias);
    return;
  }
  table.push(plain(`${prefix}mlp.gate.weight`, spec.numRoutedExperts, spec.hiddenSize));
  if (spec.topkMethod === 'noaux_tc') {
    table.push(plain(`${prefix}mlp.gate.e_score_correction_bias`, spec.numRoutedExperts));
  }
  for (let expert = 0; expert < spec.numRoutedExperts; expert++) {
    addMlp(table, `${prefix}mlp.experts.${expert}.`, spec.hiddenSize, spec.moeIntermediateSize);
  }
  if (spec.numSharedExperts > 0) {
    addMlp(table, `${prefix}mlp.shared_experts.`, spec.hiddenSize, spec.numSharedExperts * spec.moeIntermediateSize);
  }
}

function addGqa(table: ExpectedTensor[], spec: ModelSpec, prefix: string): void {
  const queryRows = spec.numAttentionHeads * spec.headDim;
  const keyRows = spec.numKeyValueHeads * spec.headDim;
  addLinear(table, `${prefix}q_proj`, queryRows, spec.hiddenSize, spec.attentionBias);
  addLinear(table, `${prefix}k_proj`, keyRows, spec.hiddenSize, spec.attentionBias);
  addLinear(table, `${prefix}v_proj`, keyRows, spec.hiddenSize, spec.attentionBias);
  addLinear(table, `${prefix}o_proj`, spec.hiddenSize, queryRows, spec.attentionBias && spec.modelType === 'llama');
}

function addMla(table: ExpectedTensor[], spec: ModelSpec, prefix: string): void {
  const queryRows = spec.numAttentionHeads * (spec.qkNopeHeadDim + spec.qkRopeHeadDim);
  const latentRows = spec.kvLoraRank + spec.qkRopeHeadDim;
  if (spec.qLoraRank > 0) {
    table.push(linear(`${prefix}q_a_proj`, spec.qLoraRank, spec.hiddenSize));
    if (spec.attentionBias) table.push(plain(`${prefix}q_a_proj.bias`, spec.qLoraRank));
    table.push(plain(`${prefix}q_a_layernorm.weight`, spec.qLoraRank));
    table.push(linear(`${prefix}q_b_proj`, queryRows, spec.qLoraRank));
  } else {
    table.push(linear(`${prefix}q_proj`, queryRows, spec.hiddenSize));
  }
  table.push(linear(`${prefix}kv_a_proj_with_mqa`, latentRows, spec.hiddenSize));
  if (spec.attentionBias) table.push(plain(`${prefix}kv_a_proj_with_mqa.bias`, latentRows));
  table.push(plain(`${prefix}kv_a_layernorm.weight`, spec.kvLoraRank));
  table.push(
    linear(`${prefix}kv_b_proj`, spec.numAttentionHeads * (spec.qkNopeHeadDim + spec.vHeadDim), spec.kvLoraRank),
  );
  table.push(linear(`${prefix}o_proj`, spec.hiddenSize, spec.numAttentionHeads * spec.vHeadDim));
  if (spec.attentionBias) table.push(plain(`${prefix}o_proj.bias`, spec.hiddenSize));
}

function addMlp(table: ExpectedTensor[], prefix: string, hidden: number, width: number, hasBias = false): void {
  addLinear(table, `${prefix}gate_proj`, width, hidden, hasBias);
  addLinear(table, `${prefix}up_proj`, width, hidden, hasBias);
  addLinear(table, `${prefix}down_proj`, hidden, width, hasBias);
}

function addLinear(table: ExpectedTensor[], name: string, rows: number, columns: number, hasBias: boolean): void {
  table.push(linear(name, rows, columns));
  if (hasBias) table.push(plain(`${name}.bias`, rows));
}
