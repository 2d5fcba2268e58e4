import { existsSync, readdirSync } from 'node:fs';
import { basename, join } from 'node:path';
import { StartupError } from '../errors.js';
import { isJsonObject, readJsonFile } from './json-file.js';
import { readSafetensorsHeader, type HeaderTensor } from './safetensors.js';

export interface Shards {
  tensors: Map<string, HeaderTensor>;
  /** index and headers, in a fixed order: what the fingerprint covers */
  metadata: { file: string; bytes: Buffer }[];
  notes: string[];
}

const INDEX = 'model.safetensors.index.json';
const SINGLE = 'model.safetensors';

/** Reads every safetensors header of a checkpoint folder: the shards that the index names, or the one file. */
export function readShards(folder: string): Shards {
  const indexPath = join(folder, INDEX);
  const index = readJsonFile(indexPath);
  if (index === null) return readSingle(folder);

  const weightMap = index.object['weight_map'];
  if (!isJsonObject(weightMap)) throw new StartupError(`${indexPath}: "weight_map" must be an object.`);
  const entries = Object.entries(weightMap);
  const firstTensorOf = new Map<string, string>(); // shard -> a tensor that the index puts there
  for (const [name, shard] of entries) {
    if (typeof shard !== 'string') throw notInFolder(indexPath, name, shard);
    if (firstTensorOf.has(shard)) continue;
    if (shard === '' || basename(shard) !== shard) throw notInFolder(indexPath, name, shard);
    firstTensorOf.set(shard, name);
  }
  if (firstTensorOf.size === 0) throw new StartupError(`${indexPath}: "weight_map" is empty.`);
  for (const [shard, tensor] of firstTensorOf) {
    if (!existsSync(join(folder, shard))) {
      throw new StartupError(
        `${join(folder, shard)} is missing; ${INDEX} says that it holds tensor "${tensor}". Download the shard.`,
      );
    }
  }

  const shards: Shards = { tensors: new Map(), metadata: [{ file: INDEX, bytes: index.bytes }], notes: [] };
  for (const shard of [...firstTensorOf.keys()].sort()) addShard(shards, folder, shard);
  const files = new Map([...firstTensorOf.keys()].map((shard) => [shard, join(folder, shard)]));
  for (const [name, shard] of entries as [string, string][]) {
    if (shards.tensors.get(name)?.file !== files.get(shard)) {
      throw new StartupError(`${files.get(shard)} does not hold tensor "${name}" although ${INDEX} says so.`);
    }
  }
  const numUnlisted = shards.tensors.size - entries.length;
  if (numUnlisted > 0) shards.notes.push(`${numUnlisted} tensors of the shards are not listed in ${INDEX}`);
  return shards;
}

function notInFolder(indexPath: string, name: string, shard: unknown): StartupError {
  return new StartupError(
    `${indexPath}: tensor "${name}" lies in ${JSON.stringify(shard)}; a shard must be the name of a file in the same folder.`,
  );
}

function readSingle(folder: string): Shards {
  const shards: Shards = { tensors: new Map(), metadata: [], notes: [] };
  if (existsSync(join(folder, SINGLE))) {
    addShard(shards, folder, SINGLE);
    return shards;
  }
  const files = readdirSync(folder);
  if (files.some((file) => file.endsWith('.safetensors'))) {
    throw new StartupError(`${join(folder, INDEX)} is missing, and there is no ${SINGLE}; download the index.`);
  }
  if (files.some((file) => /\.(bin|pt|pth|gguf)$/.test(file))) {
    throw new StartupError(`${folder} holds weights in another format; only safetensors files are supported.`);
  }
  throw new StartupError(`${folder} holds no weights: neither ${SINGLE} nor ${INDEX} is there.`);
}

function addShard(shards: Shards, folder: string, shard: string): void {
  const file = join(folder, shard);
  const header = readSafetensorsHeader(file);
  shards.metadata.push({ file: shard, bytes: header.headerBytes });
  for (const [name, tensor] of header.tensors) {
    const other = shards.tensors.get(name);
    if (other !== undefined) throw new StartupError(`Tensor "${name}" lies in both ${other.file} and ${file}.`);
    shards.tensors.set(name, tensor);
  }
}
