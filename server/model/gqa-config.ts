import type { Fields } from './fields.js';
import type { ModelSpec, ModelType } from './spec.js';

/** Dense decoders with grouped-query attention, into which R1's chains were distilled. */
export const GQA_MODEL_TYPES = ['llama', 'qwen2'] as const;
export type GqaModelType = (typeof GQA_MODEL_TYPES)[number];

export function isGqa(modelType: ModelType): modelType is GqaModelType {
  return (GQA_MODEL_TYPES as readonly ModelType[]).includes(modelType);
}

/** What a llama or qwen2 config.json says beyond what every family's does. MLA, experts and MTP are absent. */
export function readGqaConfig(fields: Fields, modelType: GqaModelType) {
  refuseVariants(fields);
  const numHeads = fields.count('num_attention_heads', 1);
  const numKeyValueHeads = fields.count('num_key_value_heads', 1, defaultKeyValueHeads(fields, modelType, numHeads));
  if (numHeads % numKeyValueHeads !== 0) {
    fields.fail('num_key_value_heads', `a divisor of num_attention_heads (${numHeads})`);
  }
  return {
    moeIntermediateSize: 0,
    numSharedExperts: 0,
    numRoutedExperts: 0,
    numExpertsPerToken: 0,
    numExpertGroups: 1,
    topkGroups: 1,
    topkMethod: 'greedy',
    scoringFunc: 'softmax',
    normTopkProb: false,
    routedScalingFactor: 1,
    firstKDenseReplace: 0,
    moeLayerFreq: 1,
    kvLoraRank: 0,
    qLoraRank: 0,
    qkNopeHeadDim: 0,
    qkRopeHeadDim: 0,
    vHeadDim: 0,
    numKeyValueHeads,
    headDim: readHeadDim(fields, numHeads),
    attentionBias: readAttentionBias(fields, modelType),
    mlpBias: readMlpBias(fields, modelType),
    ropeInterleave: false,
    numMtpLayers: 0,
  } satisfies Partial<ModelSpec>;
}

/** Absent means as many as query heads in a llama; a qwen2 that leaves it out is read differently by different readers. */
function defaultKeyValueHeads(fields: Fields, modelType: GqaModelType, numHeads: number): number | undefined {
  return modelType === 'llama' || fields.isNull('num_key_value_heads') ? numHeads : undefined;
}

function readHeadDim(fields: Fields, numHeads: number): number {
  if (!fields.has('head_dim')) {
    const hiddenSize = fields.count('hidden_size', 1);
    if (hiddenSize % (2 * numHeads) !== 0) {
      fields.fail(
        'head_dim',
        `given, because hidden_size (${hiddenSize}) is no even multiple of num_attention_heads (${numHeads})`,
      );
    }
    return hiddenSize / numHeads;
  }
  const headDim = fields.count('head_dim', 2);
  if (headDim % 2 !== 0) fields.fail('head_dim', 'even');
  return headDim;
}

/** Every qwen2 has biases of q, k and v, and none of o; its config.json does not say so. */
function readAttentionBias(fields: Fields, modelType: GqaModelType): boolean {
  if (modelType === 'llama') return fields.boolean('attention_bias', false);
  if (fields.has('attention_bias')) fields.unsupported('attention_bias', ['leaving it out']);
  return true;
}

function readMlpBias(fields: Fields, modelType: GqaModelType): boolean {
  const hasBias = fields.boolean('mlp_bias', false);
  if (hasBias && modelType !== 'llama') fields.unsupported('mlp_bias', [false]);
  return hasBias;
}

/** Keys that would change what attention computes. */
function refuseVariants(fields: Fields): void {
  if (fields.boolean('use_sliding_window', false)) fields.unsupported('use_sliding_window', [false]);
  if (fields.boolean('use_mrope', false)) fields.unsupported('use_mrope', [false]);
  if (fields.number('partial_rotary_factor', 1) !== 1) fields.unsupported('partial_rotary_factor', [1]);
  const layerTypes = fields.raw('layer_types');
  if (layerTypes === undefined) return;
  if (!Array.isArray(layerTypes) || !layerTypes.every((type) => type === 'full_attention')) {
    fields.unsupported('layer_types', [['full_attention', '...']]);
  }
}
