import { StartupError } from '../errors.js';
import { Fields } from './fields.js';
import { GQA_MODEL_TYPES, isGqa, readGqaConfig, type GqaModelType } from './gqa-config.js';
import type { JsonObject } from './json-file.js';
import { readRopeConfig } from './rope-config.js';
import type { ModelSpec, ModelType, ScoringFunc, TopkMethod } from './spec.js';

type DeepseekModelType = Exclude<ModelType, GqaModelType>;

const MODEL_TYPES: readonly ModelType[] = ['deepseek_v3', 'deepseek_v2', ...GQA_MODEL_TYPES];
const ARCHITECTURES: Record<ModelType, string> = {
  deepseek_v3: 'DeepseekV3ForCausalLM',
  deepseek_v2: 'DeepseekV2ForCausalLM',
  llama: 'LlamaForCausalLM',
  qwen2: 'Qwen2ForCausalLM',
};
const TOPK_METHODS: readonly TopkMethod[] = ['noaux_tc', 'greedy', 'group_limited_greedy'];
const SCORING_FUNCS: readonly ScoringFunc[] = ['sigmoid', 'softmax'];

interface FamilyDefaults {
  topkMethod: TopkMethod;
  scoringFunc: ScoringFunc;
  normTopkProb?: boolean;
  firstKDenseReplace?: number;
  routedScalingFactor?: number;
  numGroups?: number;
}

/**
 * What a family means by a key that its config.json leaves out. Undefined: the key is required, because readers of
 * these checkpoints disagree about it.
 */
const FAMILY_DEFAULTS: Record<DeepseekModelType, FamilyDefaults> = {
  deepseek_v3: { topkMethod: 'noaux_tc', scoringFunc: 'sigmoid' },
  deepseek_v2: {
    topkMethod: 'greedy',
    scoringFunc: 'softmax',
    normTopkProb: false,
    firstKDenseReplace: 0,
    routedScalingFactor: 1,
    numGroups: 1,
  },
};

/** config.json -> ModelSpec. weightBlockSize is what config.json says, whether or not any tensor is FP8. */
export function readModelConfig(config: JsonObject, file: string): ModelSpec {
  const fields = new Fields(config, file);
  const modelType = fields.oneOf('model_type', MODEL_TYPES);
  checkArchitecture(fields, modelType);
  fields.oneOf('hidden_act', ['silu', 'swish'], 'silu');
  const common: CommonSpec = {
    modelType,
    vocabSize: fields.count('vocab_size', 1),
    hiddenSize: fields.count('hidden_size', 1),
    intermediateSize: fields.count('intermediate_size', 1),
    numHiddenLayers: fields.count('num_hidden_layers', 1),
    numAttentionHeads: fields.count('num_attention_heads', 1),
    maxPositionEmbeddings: fields.count('max_position_embeddings', 1),
    rmsNormEps: fields.positive('rms_norm_eps', 1e-6),
    ...readRopeConfig(fields, modelType),
    tieWordEmbeddings: fields.boolean('tie_word_embeddings', false),
    weightBlockSize: readWeightBlockSize(fields),
  };
  if (isGqa(modelType)) return { ...common, ...readGqaConfig(fields, modelType) };
  const spec = { ...common, ...readDeepseekConfig(fields, modelType) };
  checkConsistency(fields, spec);
  return spec;
}

type CommonSpec = Pick<
  ModelSpec,
  | 'modelType'
  | 'vocabSize'
  | 'hiddenSize'
  | 'intermediateSize'
  | 'numHiddenLayers'
  | 'numAttentionHeads'
  | 'maxPositionEmbeddings'
  | 'rmsNormEps'
  | 'ropeTheta'
  | 'yarn'
  | 'llama3'
  | 'ropeLinearFactor'
  | 'tieWordEmbeddings'
  | 'weightBlockSize'
>;

function readDeepseekConfig(fields: Fields, modelType: DeepseekModelType): Omit<ModelSpec, keyof CommonSpec> {
  const defaults = FAMILY_DEFAULTS[modelType];
  const numRoutedExperts = fields.count('n_routed_experts', 0, 0);
  const hasExperts = numRoutedExperts > 0;
  return {
    moeIntermediateSize: hasExperts ? fields.count('moe_intermediate_size', 1) : 0,
    numSharedExperts: hasExperts ? fields.count('n_shared_experts', 0, 0) : 0,
    numRoutedExperts,
    numExpertsPerToken: hasExperts ? fields.count('num_experts_per_tok', 1) : 0,
    numExpertGroups: hasExperts ? readGroups(fields, 'n_group', defaults) : 1,
    topkGroups: hasExperts ? readGroups(fields, 'topk_group', defaults) : 1,
    topkMethod: fields.oneOf('topk_method', TOPK_METHODS, defaults.topkMethod),
    scoringFunc: fields.oneOf('scoring_func', SCORING_FUNCS, defaults.scoringFunc),
    normTopkProb: hasExperts && fields.boolean('norm_topk_prob', defaults.normTopkProb),
    routedScalingFactor: hasExperts ? fields.number('routed_scaling_factor', defaults.routedScalingFactor) : 1,
    firstKDenseReplace: hasExperts ? fields.count('first_k_dense_replace', 0, defaults.firstKDenseReplace) : 0,
    moeLayerFreq: fields.count('moe_layer_freq', 1, 1),
    kvLoraRank: fields.count('kv_lora_rank', 1),
    qLoraRank: fields.count('q_lora_rank', 0, 0),
    qkNopeHeadDim: fields.count('qk_nope_head_dim', 1),
    qkRopeHeadDim: fields.count('qk_rope_head_dim', 2),
    vHeadDim: fields.count('v_head_dim', 1),
    numKeyValueHeads: 0,
    headDim: 0,
    attentionBias: fields.boolean('attention_bias', false),
    mlpBias: false,
    ropeInterleave: fields.boolean('rope_interleave', true),
    numMtpLayers: fields.count('num_nextn_predict_layers', 0, 0),
  };
}

/** An explicit null is how configs say that there are no groups. */
function readGroups(fields: Fields, key: string, defaults: FamilyDefaults): number {
  return fields.count(key, 1, fields.isNull(key) ? 1 : defaults.numGroups);
}

function checkArchitecture(fields: Fields, modelType: ModelType): void {
  const architectures = fields.raw('architectures');
  if (architectures === undefined) return;
  const supported = ARCHITECTURES[modelType];
  if (!Array.isArray(architectures) || !architectures.includes(supported)) {
    fields.unsupported('architectures', [[supported]]);
  }
}

/** FP8 e4m3 with one scale per 128x128 block is the only quantisation; null where config.json names none. */
function readWeightBlockSize(fields: Fields): [number, number] | null {
  const quantization = fields.object('quantization_config');
  if (quantization === null) {
    if (fields.has('compression_config')) fields.unsupported('compression_config', ['leaving it out']);
    return null;
  }
  quantization.oneOf('quant_method', ['fp8']);
  quantization.oneOf('fmt', ['e4m3'], 'e4m3');
  quantization.oneOf('activation_scheme', ['dynamic'], 'dynamic');
  const size = quantization.raw('weight_block_size');
  if (!Array.isArray(size) || size.length !== 2 || size[0] !== 128 || size[1] !== 128) {
    quantization.unsupported('weight_block_size', [[128, 128]]);
  }
  return [128, 128];
}

function checkConsistency(fields: Fields, spec: ModelSpec): void {
  if (spec.qkRopeHeadDim % 2 !== 0) fields.fail('qk_rope_head_dim', 'even');
  if (spec.numRoutedExperts === 0) return;
  if (spec.numExpertsPerToken > spec.numRoutedExperts) {
    fields.fail('num_experts_per_tok', `at most n_routed_experts (${spec.numRoutedExperts})`);
  }
  if (spec.topkMethod === 'greedy') return;
  if (spec.numRoutedExperts % spec.numExpertGroups !== 0) {
    fields.fail('n_group', `a divisor of n_routed_experts (${spec.numRoutedExperts})`);
  }
  const groupSize = spec.numRoutedExperts / spec.numExpertGroups;
  if (spec.topkGroups > spec.numExpertGroups) fields.fail('topk_group', `at most n_group (${spec.numExpertGroups})`);
  if (spec.numExpertsPerToken > spec.topkGroups * groupSize) {
    fields.fail('num_experts_per_tok', `at most the ${spec.topkGroups * groupSize} experts of the chosen groups`);
  }
  if (spec.topkMethod === 'noaux_tc' && spec.numExpertGroups > 1 && groupSize < 2) {
    fields.fail('n_group', 'such that each group has two experts, whose scores noaux_tc adds');
  }
}

/** A token id, or null where absent. */
export function readTokenId(config: JsonObject, key: string, vocabSize: number, file: string): number | null {
  const ids = readTokenIds(config, key, vocabSize, file);
  if (ids.length > 1) throw new StartupError(`${file}: "${key}" must be one token id, not a list of ${ids.length}.`);
  return ids[0] ?? null;
}

/** A token id or a list of them; empty where absent. */
export function readTokenIds(config: JsonObject, key: string, vocabSize: number, file: string): number[] {
  const value = config[key] ?? [];
  const ids: unknown[] = Array.isArray(value) ? value : [value];
  for (const id of ids) {
    if (typeof id !== 'number' || !Number.isInteger(id) || id < 0 || id >= vocabSize) {
      throw new StartupError(
        `${file}: "${key}" is ${JSON.stringify(value)}; token ids must be whole numbers from 0 to ${vocabSize - 1}.`,
      );
    }
  }
  return [...new Set(ids as number[])];
}
