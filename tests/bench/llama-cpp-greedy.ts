/** Greedy answers of a GGUF file through node-llama-cpp, as token ids. */
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';

interface Sequence {
  evaluate(ids: number[], options: { temperature: number }): AsyncIterable<number>;
  dispose(): void;
}

interface NodeLlamaCpp {
  getLlama(options: { gpu: false; build: 'never'; maxThreads: number; logLevel: string }): Promise<{
    loadModel(options: { modelPath: string }): Promise<{
      createContext(options: { contextSize: number; threads: number }): Promise<{ getSequence(): Sequence }>;
      dispose(): Promise<void>;
    }>;
    dispose(): Promise<void>;
  }>;
}

/** The package lies in `folder`, not in ours. Ends after `count` tokens or before the end token. */
export async function greedyIds(
  folder: string,
  file: string,
  threads: number,
  promptIds: number[],
  count: number,
): Promise<number[]> {
  const entry = join(folder, 'node_modules/node-llama-cpp/dist/index.js');
  const peer = (await import(pathToFileURL(entry).href)) as NodeLlamaCpp;
  const llama = await peer.getLlama({ gpu: false, build: 'never', maxThreads: threads, logLevel: 'error' });
  const model = await llama.loadModel({ modelPath: file });
  try {
    const context = await model.createContext({ contextSize: promptIds.length + count + 8, threads });
    const ids: number[] = [];
    for await (const id of context.getSequence().evaluate(promptIds, { temperature: 0 })) {
      ids.push(id);
      if (ids.length === count) break;
    }
    return ids;
  } finally {
    await model.dispose();
    await llama.dispose();
  }
}
