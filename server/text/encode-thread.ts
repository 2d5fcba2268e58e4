import { Worker } from 'node:worker_threads';
import { ApiError, type ErrorCode } from '../errors.js';
import type { TemplateInput } from './chat-template.js';
import type { TokenizerFiles } from './tokenizer.js';

/** What the thread is started with: plain values. */
export interface EncodeThreadData {
  files: TokenizerFiles;
  templateSource: string;
  specialTokens: Record<string, string>;
}

export interface EncodeJob {
  jobId: number;
  input: TemplateInput;
}

export interface EncodeReply {
  jobId: number;
  ids?: number[]; // [num_tokens]
  error?: { code: ErrorCode | null; message: string; param: string | null };
}

interface Waiting {
  resolve: (ids: number[]) => void;
  reject: (error: Error) => void;
}

/** A conversation that takes longer than this is given up, and the thread with it: templates have no step limit. */
const MAX_JOB_MS = 60_000;

/** A thread with an encoder of its own for large conversations; started by the first, one conversation at a time. */
export class EncodeThread {
  readonly #data: EncodeThreadData;
  readonly #maxJobMs: number;
  readonly #waiting = new Map<number, Waiting>(); // in the order of the jobs
  #worker: Worker | null = null;
  #timer: NodeJS.Timeout | undefined;
  #nextJobId = 0;

  constructor(data: EncodeThreadData, maxJobMs = MAX_JOB_MS) {
    this.#data = data;
    this.#maxJobMs = maxJobMs;
  }

  encode(input: TemplateInput): Promise<number[]> {
    const worker = (this.#worker ??= this.#start());
    const jobId = this.#nextJobId++;
    return new Promise((resolve, reject) => {
      this.#waiting.set(jobId, { resolve, reject });
      if (this.#waiting.size === 1) this.#watchJob();
      worker.postMessage({ jobId, input } satisfies EncodeJob);
    });
  }

  async close(): Promise<void> {
    clearTimeout(this.#timer);
    await this.#worker?.terminate();
  }

  #start(): Worker {
    const worker = startThread(this.#data);
    worker.unref();
    worker.on('message', (reply: EncodeReply) => this.#receive(reply));
    worker.on('error', (error) => this.#fail(worker, error));
    worker.on('exit', () => this.#fail(worker, new Error('the encoding thread has ended')));
    return worker;
  }

  #receive({ jobId, ids, error }: EncodeReply): void {
    const waiting = this.#waiting.get(jobId);
    this.#waiting.delete(jobId);
    this.#watchJob();
    if (ids) waiting?.resolve(ids);
    else
      waiting?.reject(error?.code ? new ApiError(error.code, error.message, error.param) : new Error(error?.message));
  }

  #watchJob(): void {
    clearTimeout(this.#timer);
    if (this.#waiting.size === 0) return;
    this.#timer = setTimeout(() => {
      const message = `The conversation could not be rendered within ${this.#maxJobMs / 1000} s; shorten it.`;
      const worker = this.#worker!;
      void worker.terminate();
      this.#fail(worker, new ApiError('template_error', message, 'messages'));
    }, this.#maxJobMs);
  }

  /** Ends all that wait; the next job starts another thread. */
  #fail(worker: Worker, error: Error): void {
    if (this.#worker !== worker) return;
    this.#worker = null;
    clearTimeout(this.#timer);
    for (const { reject } of this.#waiting.values()) reject(error);
    this.#waiting.clear();
  }
}

function startThread(data: EncodeThreadData): Worker {
  if (!import.meta.url.endsWith('.ts')) {
    return new Worker(new URL('./encode-thread-entry.js', import.meta.url), { workerData: data });
  }
  // From source: tsx does not reach into threads by itself.
  const entry = JSON.stringify(new URL('./encode-thread-entry.ts', import.meta.url).href);
  const source = `import('tsx/esm/api').then((tsx) => { tsx.register(); return import(${entry}); })`;
  return new Worker(source, { eval: true, workerData: data });
}
