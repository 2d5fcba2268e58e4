import { Worker } from 'node:worker_threads';
import type { TokenizerFiles } from './tokenizer.js';

export interface EncodeJob {
  jobId: number;
  rendered: string;
  mark: string;
}

export interface EncodeReply {
  jobId: number;
  ids?: number[];
  message?: string;
}

interface Waiting {
  resolve: (ids: number[]) => void;
  reject: (error: Error) => void;
}

/** One worker thread with a tokenizer of its own; started by the first long text, one at a time after that. */
export class EncodeWorker {
  readonly #files: TokenizerFiles;
  readonly #waiting = new Map<number, Waiting>();
  #worker: Worker | null = null;
  #nextJobId = 0;

  constructor(files: TokenizerFiles) {
    this.#files = files;
  }

  encodeRendered(rendered: string, mark: string): Promise<number[]> {
    const worker = (this.#worker ??= this.#start());
    const jobId = this.#nextJobId++;
    return new Promise((resolve, reject) => {
      this.#waiting.set(jobId, { resolve, reject });
      worker.postMessage({ jobId, rendered, mark } satisfies EncodeJob);
    });
  }

  async close(): Promise<void> {
    await this.#worker?.terminate();
  }

  #start(): Worker {
    const worker = startThread(this.#files);
    worker.unref();
    worker.on('message', (reply: EncodeReply) => {
      const waiting = this.#waiting.get(reply.jobId);
      this.#waiting.delete(reply.jobId);
      if (reply.ids) waiting?.resolve(reply.ids);
      else waiting?.reject(new Error(reply.message));
    });
    const fail = (error: Error): void => {
      if (this.#worker === worker) this.#worker = null;
      for (const { reject } of this.#waiting.values()) reject(error);
      this.#waiting.clear();
    };
    worker.on('error', fail);
    worker.on('exit', () => fail(new Error('the tokenizer thread has ended')));
    return worker;
  }
}

function startThread(files: TokenizerFiles): Worker {
  if (!import.meta.url.endsWith('.ts')) {
    return new Worker(new URL('./encode-worker.js', import.meta.url), { workerData: files });
  }
  // From source: tsx does not reach into threads by itself.
  const entry = JSON.stringify(new URL('./encode-worker.ts', import.meta.url).href);
  const source = `import('tsx/esm/api').then((tsx) => { tsx.register(); return import(${entry}); })`;
  return new Worker(source, { eval: true, workerData: files });
}
