import type { Fields } from './fields.js';
import type { YarnScaling } from './spec.js';

export interface RopeConfig {
  theta: number;
  yarn: YarnScaling | null;
}

const ROPE_TYPES = ['default', 'yarn'] as const;

/** Keys of a YaRN dictionary that change nothing once the others are known. */
const KNOWN_YARN_KEYS = new Set([
  'type',
  'rope_type',
  'rope_theta',
  'factor',
  'beta_fast',
  'beta_slow',
  'mscale',
  'mscale_all_dim',
  'original_max_position_embeddings',
]);

/**
 * Rotary embedding of a config.json: `rope_theta` beside `rope_scaling` (type or rope_type), or both inside
 * `rope_parameters` as Transformers 5 writes them.
 */
export function readRopeConfig(config: Fields): RopeConfig {
  const key = config.has('rope_parameters') ? 'rope_parameters' : 'rope_scaling';
  const scaling = config.object(key);
  const theta = scaling?.has('rope_theta') ? scaling.positive('rope_theta') : config.positive('rope_theta', 10000);
  if (scaling === null) return { theta, yarn: null };
  const typeKey = scaling.has('rope_type') ? 'rope_type' : 'type';
  // Transformers 5 leaves the type out of a dictionary that holds rope_theta alone.
  const hasThetaAlone = scaling.keys().every((name) => name === 'rope_theta');
  const type = scaling.oneOf(typeKey, ROPE_TYPES, hasThetaAlone ? 'default' : undefined);
  if (type === 'default') return { theta, yarn: null };
  for (const name of scaling.keys()) {
    if (name === 'truncate' && scaling.boolean(name)) continue;
    if (name === 'partial_rotary_factor' && scaling.number(name) === 1) continue;
    if (!KNOWN_YARN_KEYS.has(name)) scaling.unsupported(name, ['leaving it out']);
  }
  return {
    theta,
    yarn: {
      factor: scaling.positive('factor'),
      betaFast: scaling.positive('beta_fast', 32),
      betaSlow: scaling.positive('beta_slow', 1),
      mscale: scaling.number('mscale', 1),
      mscaleAllDim: scaling.number('mscale_all_dim', 0),
      originalMaxPositionEmbeddings: scaling.count('original_max_position_embeddings', 1),
    },
  };
}
