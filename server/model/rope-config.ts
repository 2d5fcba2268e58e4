import type { Fields } from './fields.js';
import { isGqa } from './gqa-config.js';
import type { Llama3Scaling, ModelSpec, ModelType, YarnScaling } from './spec.js';

export type RopeConfig = Pick<ModelSpec, 'ropeTheta' | 'yarn' | 'llama3' | 'ropeLinearFactor'>;

const MLA_ROPE_TYPES: readonly string[] = ['default', 'yarn'];
const GQA_ROPE_TYPES: readonly string[] = ['default', 'llama3', 'linear', 'yarn'];

/** Keys that may stand in the dictionary of a type. mscale and mscale_all_dim are MLA's alone. */
const KNOWN_KEYS: Record<string, readonly string[]> = {
  yarn: ['factor', 'beta_fast', 'beta_slow', 'original_max_position_embeddings'],
  llama3: ['factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'],
  linear: ['factor'],
};
const MLA_YARN_KEYS = ['mscale', 'mscale_all_dim'];

/**
 * Rotary embedding of a config.json: `rope_theta` beside `rope_scaling` (type or rope_type), or both inside
 * `rope_parameters` as Transformers 5 writes them.
 */
export function readRopeConfig(config: Fields, modelType: ModelType): RopeConfig {
  const key = config.has('rope_parameters') ? 'rope_parameters' : 'rope_scaling';
  const scaling = config.object(key);
  const ropeTheta = scaling?.has('rope_theta') ? scaling.positive('rope_theta') : config.positive('rope_theta', 10000);
  const plain: RopeConfig = { ropeTheta, yarn: null, llama3: null, ropeLinearFactor: 1 };
  if (scaling === null) return plain;
  const typeKey = scaling.has('rope_type') ? 'rope_type' : 'type';
  // Transformers 5 leaves the type out of a dictionary that holds rope_theta alone.
  const hasThetaAlone = scaling.keys().every((name) => name === 'rope_theta');
  const types = isGqa(modelType) ? GQA_ROPE_TYPES : MLA_ROPE_TYPES;
  const type = scaling.oneOf(typeKey, types, hasThetaAlone ? 'default' : undefined);
  if (type === 'default') return plain;
  refuseUnknownKeys(scaling, type, isGqa(modelType));
  if (type === 'linear') return { ...plain, ropeLinearFactor: scaling.positive('factor') };
  if (type === 'llama3') return { ...plain, llama3: readLlama3(scaling) };
  return { ...plain, yarn: readYarn(scaling) };
}

function refuseUnknownKeys(scaling: Fields, type: string, isGqaModel: boolean): void {
  const known = new Set([
    'type',
    'rope_type',
    'rope_theta',
    ...KNOWN_KEYS[type]!,
    ...(isGqaModel ? [] : MLA_YARN_KEYS),
  ]);
  for (const name of scaling.keys()) {
    if (name === 'truncate' && scaling.boolean(name)) continue;
    if (name === 'partial_rotary_factor' && scaling.number(name) === 1) continue;
    if (!known.has(name)) scaling.unsupported(name, ['leaving it out']);
  }
}

function readYarn(scaling: Fields): YarnScaling {
  return {
    factor: scaling.positive('factor'),
    betaFast: scaling.positive('beta_fast', 32),
    betaSlow: scaling.positive('beta_slow', 1),
    mscale: scaling.number('mscale', 1),
    mscaleAllDim: scaling.number('mscale_all_dim', 0),
    originalMaxPositionEmbeddings: scaling.count('original_max_position_embeddings', 1),
  };
}

function readLlama3(scaling: Fields): Llama3Scaling {
  const lowFreqFactor = scaling.positive('low_freq_factor');
  const highFreqFactor = scaling.positive('high_freq_factor');
  if (highFreqFactor <= lowFreqFactor) scaling.fail('high_freq_factor', `above low_freq_factor (${lowFreqFactor})`);
  return {
    factor: scaling.positive('factor'),
    lowFreqFactor,
    highFreqFactor,
    originalMaxPositionEmbeddings: scaling.count('original_max_position_embeddings', 1),
  };
}
