/**
 * What server/model has read and checked of a checkpoint folder, in plain values. It is handed to the
 * addon unchanged (the addon checks it again), so every field is a number, string, boolean or list.
 */

export type TensorDtype = 'F8_E4M3' | 'BF16' | 'F16' | 'F32';

/** One tensor of one safetensors shard. */
export interface TensorEntry {
  name: string;
  dtype: TensorDtype;
  shape: number[];
  /** absolute path of the shard; empty: random values, made in memory */
  file: string;
  /** absolute byte offset in the file */
  offset: number;
  bytes: number;
}

export interface YarnScaling {
  factor: number;
  betaFast: number;
  betaSlow: number;
  mscale: number;
  mscaleAllDim: number;
  originalMaxPositionEmbeddings: number;
}

/** Long wavelengths are stretched by factor, short ones stay, a linear ramp lies between. */
export interface Llama3Scaling {
  factor: number;
  lowFreqFactor: number;
  highFreqFactor: number;
  originalMaxPositionEmbeddings: number;
}

export type ModelType = 'deepseek_v3' | 'deepseek_v2' | 'llama' | 'qwen2';
export type TopkMethod = 'noaux_tc' | 'greedy' | 'group_limited_greedy';
export type ScoringFunc = 'sigmoid' | 'softmax';

/**
 * Architecture of a decoder. Names follow the checkpoint's config.json. deepseek_* have MLA, llama and qwen2
 * grouped-query attention (GQA); what belongs to the other kind of attention is 0.
 */
export interface ModelSpec {
  modelType: ModelType;
  vocabSize: number;
  hiddenSize: number;
  intermediateSize: number;
  moeIntermediateSize: number;
  numHiddenLayers: number;
  numAttentionHeads: number;
  numSharedExperts: number;
  /** 0: every layer is dense */
  numRoutedExperts: number;
  numExpertsPerToken: number;
  numExpertGroups: number;
  topkGroups: number;
  topkMethod: TopkMethod;
  scoringFunc: ScoringFunc;
  normTopkProb: boolean;
  routedScalingFactor: number;
  firstKDenseReplace: number;
  moeLayerFreq: number;
  kvLoraRank: number;
  /** 0: q_proj instead of q_a_proj/q_b_proj */
  qLoraRank: number;
  qkNopeHeadDim: number;
  qkRopeHeadDim: number;
  vHeadDim: number;
  /** GQA */
  numKeyValueHeads: number;
  /** GQA */
  headDim: number;
  /** of q_a, kv_a, o (MLA); q, k, v, o (llama); q, k, v (qwen2) */
  attentionBias: boolean;
  /** of gate, up, down; llama only */
  mlpBias: boolean;
  maxPositionEmbeddings: number;
  rmsNormEps: number;
  ropeTheta: number;
  ropeInterleave: boolean;
  /** at most one of yarn, llama3 and ropeLinearFactor stretches the rotary embedding */
  yarn: YarnScaling | null;
  llama3: Llama3Scaling | null;
  /** positions are divided by it; 1: they are not */
  ropeLinearFactor: number;
  tieWordEmbeddings: boolean;
  /** MTP modules after the decoder layers; 0 where the checkpoint has none */
  numMtpLayers: number;
  /** [rows, columns] of one FP8 block scale; null where no tensor is FP8 */
  weightBlockSize: [number, number] | null;
}

/** generation_config.json, as far as it sets defaults. Absent values are undefined. */
export interface GenerationDefaults {
  doSample?: boolean;
  temperature?: number;
  topP?: number;
  topK?: number;
  minP?: number;
  repetitionPenalty?: number;
  /** ends a sequence */
  eosTokenIds: number[];
}

/** A checkpoint whose metadata has been read and checked; no byte of weights has been touched. */
export interface Checkpoint {
  folder: string;
  /** last component of the folder: the default served model name */
  name: string;
  spec: ModelSpec;
  tensors: TensorEntry[];
  /** sum of tensor bytes */
  weightBytes: number;
  defaults: GenerationDefaults;
  bosTokenId: number | null;
  /** SHA-256 over config and every safetensors header, hex: names the weights in system_fingerprint and cache keys */
  fingerprint: string;
  /** what the reader noticed and the user should read once: sentences without a full stop, for the log */
  notes: string[];
}
