import { createHash } from 'node:crypto';
import { statSync } from 'node:fs';
import { basename, join, resolve } from 'node:path';
import { StartupError } from '../errors.js';
import { readGenerationDefaults } from './generation-config.js';
import { readJsonFile } from './json-file.js';
import { readModelConfig, readTokenId } from './model-config.js';
import type { HeaderTensor } from './safetensors.js';
import { readShards, type Shards } from './shards.js';
import type { Checkpoint, ModelSpec, TensorDtype, TensorEntry } from './spec.js';
import { decoderTensors, mtpTensors, type ExpectedTensor } from './tensor-table.js';

const FLOAT_DTYPES = ['BF16', 'F16', 'F32'];

/**
 * Reads a checkpoint folder and checks all of its metadata. Synchronous: it takes tens of milliseconds and happens
 * once, before anything else can. Throws StartupError with one sentence that names file and tensor.
 */
export function readCheckpoint(path: string): Checkpoint {
  const folder = resolve(path);
  if (!statSync(folder, { throwIfNoEntry: false })?.isDirectory()) {
    throw new StartupError(`${folder} is no folder; --model must name a folder with a Hugging Face checkpoint.`);
  }
  const configFile = join(folder, 'config.json');
  const config = readJsonFile(configFile);
  if (config === null) {
    throw new StartupError(`${configFile} is missing; --model must name a folder with a Hugging Face checkpoint.`);
  }
  const spec = readModelConfig(config.object, configFile);
  const generationFile = join(folder, 'generation_config.json');
  const generation = readJsonFile(generationFile);
  const defaults = readGenerationDefaults(
    generation && { file: generationFile, object: generation.object },
    { file: configFile, object: config.object },
    spec.vocabSize,
  );
  const bosTokenId = readTokenId(config.object, 'bos_token_id', spec.vocabSize, configFile);

  const shards = readShards(folder);
  const notes = [...shards.notes];
  spec.numMtpLayers = countMtpLayers(spec, shards, notes);
  const tensors = collectTensors(spec, shards, configFile, notes);
  if (!tensors.some((tensor) => tensor.dtype === 'F8_E4M3')) spec.weightBlockSize = null;
  return {
    folder,
    name: basename(folder),
    spec,
    tensors,
    weightBytes: tensors.reduce((sum, tensor) => sum + tensor.bytes, 0),
    defaults,
    bosTokenId,
    fingerprint: fingerprintOf([{ file: 'config.json', bytes: config.bytes }, ...shards.metadata]),
    notes,
  };
}

/** MTP modules present: all that config.json announces, or none where none of their tensors is there. */
function countMtpLayers(spec: ModelSpec, shards: Shards, notes: string[]): number {
  if (spec.numMtpLayers === 0) return 0;
  for (const name of shards.tensors.keys()) {
    const layer = /^model\.layers\.(\d+)\./.exec(name)?.[1];
    if (layer !== undefined && Number(layer) >= spec.numHiddenLayers) return spec.numMtpLayers;
  }
  notes.push(
    `config.json announces ${spec.numMtpLayers} MTP module(s) whose weights are not in the checkpoint; it is served without`,
  );
  return 0;
}

/** The expected tensors, scales included, in the order of the table. */
function collectTensors(spec: ModelSpec, shards: Shards, configFile: string, notes: string[]): TensorEntry[] {
  const table = decoderTensors(spec);
  for (let index = 0; index < spec.numMtpLayers; index++) table.push(...mtpTensors(spec, index));
  const entries: TensorEntry[] = [];
  const used = new Set<string>();
  for (const expected of table) {
    if (expected.isOptional && !shards.tensors.has(expected.name)) continue;
    const tensor = findTensor(expected, shards, configFile);
    entries.push(tensor);
    used.add(tensor.name);
    if (tensor.dtype !== 'F8_E4M3') continue;
    const scale = findScale(tensor, spec, shards, configFile);
    entries.push(scale);
    used.add(scale.name);
  }
  const extra: string[] = [];
  for (const name of shards.tensors.keys()) {
    if (!used.has(name) && !name.endsWith('rotary_emb.inv_freq')) extra.push(name);
  }
  if (extra.length > 0) {
    notes.push(`${extra.length} tensor(s) that this architecture does not use are left alone, "${extra[0]}" first`);
  }
  return entries;
}

function findTensor(expected: ExpectedTensor, shards: Shards, configFile: string): TensorEntry {
  const { name, shape, canBeFp8 } = expected;
  const tensor = shards.tensors.get(name);
  if (tensor === undefined) {
    throw new StartupError(`${configFile} calls for tensor "${name}" ${dims(shape)}, which no shard holds.`);
  }
  checkShape(name, tensor, shape, () => `config.json calls for ${dims(shape)}`);
  const allowed = canBeFp8 ? ['F8_E4M3', ...FLOAT_DTYPES] : FLOAT_DTYPES;
  if (!allowed.includes(tensor.dtype)) {
    throw new StartupError(
      `${tensor.file}: tensor "${name}" has the dtype ${tensor.dtype}, which is not supported there; supported: ${allowed.join(', ')}.`,
    );
  }
  return toEntry(name, tensor);
}

function findScale(weight: TensorEntry, spec: ModelSpec, shards: Shards, configFile: string): TensorEntry {
  if (spec.weightBlockSize === null) {
    throw new StartupError(
      `${weight.file}: tensor "${weight.name}" is F8_E4M3 but ${configFile} has no "quantization_config" with "quant_method": "fp8".`,
    );
  }
  const name = `${weight.name}_scale_inv`;
  const scale = shards.tensors.get(name);
  if (scale === undefined) {
    throw new StartupError(`${weight.file}: tensor "${weight.name}" is F8_E4M3 but its scales "${name}" are missing.`);
  }
  const shape = weight.shape.map((dim, axis) => Math.ceil(dim / spec.weightBlockSize![axis]!));
  checkShape(name, scale, shape, () => `a weight of ${dims(weight.shape)} calls for ${dims(shape)}`);
  if (scale.dtype !== 'F32') {
    throw new StartupError(`${scale.file}: scales "${name}" have the dtype ${scale.dtype}; supported: F32.`);
  }
  return toEntry(name, scale);
}

function checkShape(name: string, tensor: HeaderTensor, shape: number[], reason: () => string): void {
  if (tensor.shape.length === shape.length && tensor.shape.every((dim, axis) => dim === shape[axis])) return;
  throw new StartupError(`${tensor.file}: tensor "${name}" has the shape ${dims(tensor.shape)}; ${reason()}.`);
}

function toEntry(name: string, tensor: HeaderTensor): TensorEntry {
  const { dtype, shape, file, offset, bytes } = tensor;
  return { name, dtype: dtype as TensorDtype, shape, file, offset, bytes };
}

function dims(shape: number[]): string {
  return `[${shape.join(', ')}]`;
}

function fingerprintOf(files: { file: string; bytes: Buffer }[]): string {
  const hash = createHash('sha256');
  for (const { file, bytes } of files) hash.update(`${file} ${bytes.length}\n`).update(bytes);
  return hash.digest('hex');
}
