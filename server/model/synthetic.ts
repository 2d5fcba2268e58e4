import { createHash } from 'node:crypto';
import { statSync } from 'node:fs';
import { basename, join, resolve } from 'node:path';
import { StartupError } from '../errors.js';
import { readCheckpoint } from './checkpoint.js';
import { readGenerationDefaults } from './generation-config.js';
import { readJsonFile } from './json-file.js';
import { readModelConfig, readTokenId } from './model-config.js';
import type { Checkpoint, ModelSpec, TensorDtype, TensorEntry } from './spec.js';
import { decoderTensors, type ExpectedTensor } from './tensor-table.js';

const DTYPE_BYTES: Record<TensorDtype, number> = { F8_E4M3: 1, BF16: 2, F16: 2, F32: 4 };

/** An architecture without a checkpoint: its tensors name no file, and the addon makes random values for them. */
export interface SyntheticModel {
  spec: ModelSpec;
  tensors: TensorEntry[];
  weightBytes: number;
}

/**
 * The model that a config.json, or the one in a folder, describes. With `numLayers` a slice of so many decoder layers:
 * at most one dense layer first, then MoE layers, for those are what a real model is made of. MTP modules are left out.
 */
export function readSyntheticModel(path: string, numLayers: number | null): SyntheticModel {
  const isFolder = statSync(resolve(path), { throwIfNoEntry: false })?.isDirectory() === true;
  const file = isFolder ? join(resolve(path), 'config.json') : resolve(path);
  const config = readJsonFile(file);
  if (config === null) {
    throw new StartupError(`${file} is missing; --model must name a config.json or a folder with one.`);
  }
  const spec = readModelConfig(config.object, file);
  if (numLayers !== null) {
    if (numLayers > spec.numHiddenLayers) {
      throw new StartupError(`--layers is ${numLayers} but ${file} has only ${spec.numHiddenLayers} layers.`);
    }
    spec.numHiddenLayers = numLayers;
    spec.firstKDenseReplace = Math.min(spec.firstKDenseReplace, 1);
  }
  spec.numMtpLayers = 0;
  const tensors = decoderTensors(spec).flatMap((expected) => entriesOf(expected, spec));
  return { spec, tensors, weightBytes: tensors.reduce((sum, { bytes }) => sum + bytes, 0) };
}

/** A folder's checkpoint; synthetic: one with random weights in its place, of which the folder has no shard. */
export function readWeights(path: string, which: 'checkpoint' | 'synthetic'): Checkpoint {
  if (which === 'checkpoint') return readCheckpoint(path);
  const folder = resolve(path);
  const configFile = join(folder, 'config.json');
  const model = readSyntheticModel(path, null);
  const config = readJsonFile(configFile);
  if (config === null) throw new StartupError(`${configFile} is missing; a folder is served, not a file.`);
  const generationFile = join(folder, 'generation_config.json');
  const generation = readJsonFile(generationFile);
  const { vocabSize } = model.spec;
  return {
    ...model,
    folder,
    name: basename(folder),
    defaults: readGenerationDefaults(
      generation && { file: generationFile, object: generation.object },
      { file: configFile, object: config.object },
      vocabSize,
    ),
    bosTokenId: readTokenId(config.object, 'bos_token_id', vocabSize, configFile),
    fingerprint: createHash('sha256').update('synthetic').update(config.bytes).digest('hex'),
    notes: ['the weights are random numbers'],
  };
}

/** A tensor, and where it is FP8 its scales. */
function entriesOf({ name, shape, canBeFp8 }: ExpectedTensor, spec: ModelSpec): TensorEntry[] {
  if (!canBeFp8 || spec.weightBlockSize === null) return [entryOf(name, shape, 'BF16')];
  const blocks = shape.map((size, axis) => Math.ceil(size / spec.weightBlockSize![axis]!));
  return [entryOf(name, shape, 'F8_E4M3'), entryOf(`${name}_scale_inv`, blocks, 'F32')];
}

function entryOf(name: string, shape: number[], dtype: TensorDtype): TensorEntry {
  const bytes = shape.reduce((product, size) => product * size, DTYPE_BYTES[dtype]);
  return { name, dtype, shape, file: '', offset: 0, bytes };
}
