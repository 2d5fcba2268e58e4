import { Worker } from 'node:worker_threads';
import type { Grammar } from './grammar.js';
import type { MatcherMask } from './matcher.js';
import type { GrammarCommand, GrammarReply, GrammarThreadData } from './protocol.js';

export interface GrammarThreadOptions extends GrammarThreadData {
  /** a grammar whose first mask takes longer is given up, and the thread with it */
  compileMs?: number;
  /** the same for every later mask */
  maskMs?: number;
  /** script of the thread, a .ts or .js file; tests give one that hangs */
  entry?: URL;
}

/** Told to whoever opened a sequence: each mask, or once why there is none. */
export interface GrammarListener {
  onMask(mask: MatcherMask): void;
  /** isFirst: the grammar itself is at fault, not what has been generated since */
  onFailed(message: string, isFirst: boolean): void;
}

interface Followed {
  listener: GrammarListener;
  key: string;
  grammar: Grammar;
  stopIds: number[];
  /** all tokens so far: what a new thread is told */
  tokens: number[]; // [num_accepted]
  numLeft: number;
  hasMask: boolean;
}

const COMPILE_MS = 500;
const MASK_MS = 2000;
const START_MS = 60_000;
const MAX_START_FAILURES = 3;

/**
 * Masks of sequences that follow a grammar, computed in a thread. The thread answers in order, so where it hangs the
 * oldest question is the culprit: that sequence fails, and another thread is told all the others. Started by the first
 * sequence.
 */
export class GrammarThread {
  readonly #options: GrammarThreadOptions;
  readonly #followed = new Map<number, Followed>();
  #waiting: number[] = []; // handles whose masks are owed, oldest first
  #worker: Worker | null = null;
  #isReady = false;
  #numStartFailures = 0;
  #nextHandle = 0;
  #timer: NodeJS.Timeout | undefined;

  constructor(options: GrammarThreadOptions) {
    this.#options = options;
  }

  /** Begins to follow a grammar for `numLeft` tokens at most; the first mask is told the listener. */
  open(key: string, grammar: Grammar, stopIds: number[], numLeft: number, listener: GrammarListener): number {
    const handle = this.#nextHandle++;
    this.#followed.set(handle, { listener, key, grammar, stopIds, tokens: [], numLeft, hasMask: false });
    if (this.#worker === null) this.#start();
    this.#ask({ type: 'open', handle, key, grammar, stopIds, tokens: [], numLeft });
    return handle;
  }

  /** Goes on by these tokens, `numLeft` more may follow; the mask behind them is told the listener. */
  accept(handle: number, tokens: number[], numLeft: number): void {
    const followed = this.#followed.get(handle);
    if (followed === undefined) return;
    followed.tokens.push(...tokens);
    followed.numLeft = numLeft;
    this.#ask({ type: 'accept', handle, tokens, numLeft });
  }

  /** Forgets a sequence; what is still owed to it is dropped. */
  close(handle: number): void {
    if (!this.#followed.delete(handle)) return;
    this.#worker?.postMessage({ type: 'close', handle } satisfies GrammarCommand);
  }

  async end(): Promise<void> {
    clearTimeout(this.#timer);
    this.#followed.clear();
    const worker = this.#worker;
    this.#worker = null;
    await worker?.terminate();
  }

  #ask(command: Exclude<GrammarCommand, { type: 'close' }>): void {
    this.#waiting.push(command.handle);
    this.#worker?.postMessage(command);
    if (this.#waiting.length === 1) this.#watch();
  }

  #start(): void {
    const { tokenizer, vocabSize, entry } = this.#options;
    const worker = startThread({ tokenizer, vocabSize }, entry);
    worker.unref();
    this.#worker = worker;
    this.#isReady = false;
    worker.on('message', (reply: GrammarReply) => {
      if (worker === this.#worker) this.#receive(reply);
    });
    worker.on('error', (error) => this.#restart(worker, error.message));
    worker.on('exit', () => this.#restart(worker, 'the grammar thread has ended'));
    this.#watch();
  }

  #receive(reply: GrammarReply): void {
    if (reply.type === 'ready') {
      this.#isReady = true;
      this.#numStartFailures = 0;
      return this.#watch();
    }
    this.#waiting.shift();
    this.#watch();
    const followed = this.#followed.get(reply.handle);
    if (followed === undefined) return;
    if (reply.type === 'failed') return this.#fail(reply.handle, reply.message);
    followed.hasMask = true;
    followed.listener.onMask(reply.mask);
  }

  /** One timer, for the question that the thread is at. */
  #watch(): void {
    clearTimeout(this.#timer);
    const [handle] = this.#waiting;
    const worker = this.#worker;
    if (handle === undefined || worker === null) return;
    const { compileMs = COMPILE_MS, maskMs = MASK_MS } = this.#options;
    const hasMask = this.#followed.get(handle)?.hasMask === true;
    const limit = !this.#isReady ? START_MS : hasMask ? maskMs : compileMs;
    const reason = hasMask ? 'the next tokens could not be found' : 'the grammar could not be prepared';
    this.#timer = setTimeout(() => this.#restart(worker, `${reason} within ${limit} ms`), limit);
  }

  /** Gives the thread up. The question that it was at fails; before it was ready, all fail after several tries. */
  #restart(worker: Worker, reason: string): void {
    if (worker !== this.#worker) return;
    void worker.terminate();
    this.#worker = null;
    const [culprit] = this.#waiting;
    this.#waiting = [];
    if (this.#isReady) {
      if (culprit !== undefined) this.#fail(culprit, reason);
    } else if (++this.#numStartFailures >= MAX_START_FAILURES) {
      this.#numStartFailures = 0;
      for (const handle of [...this.#followed.keys()]) this.#fail(handle, reason);
    }
    if (this.#followed.size === 0 || this.#worker !== null) return;
    this.#start();
    for (const [handle, { key, grammar, stopIds, tokens, numLeft }] of this.#followed) {
      this.#ask({ type: 'open', handle, key, grammar, stopIds, tokens, numLeft });
    }
  }

  #fail(handle: number, message: string): void {
    const followed = this.#followed.get(handle);
    if (followed === undefined) return;
    this.close(handle);
    followed.listener.onFailed(message, !followed.hasMask);
  }
}

function startThread(data: GrammarThreadData, entry: URL | undefined): Worker {
  const isSource = import.meta.url.endsWith('.ts');
  const script = entry ?? new URL(isSource ? './thread-entry.ts' : './thread-entry.js', import.meta.url);
  if (!script.pathname.endsWith('.ts')) return new Worker(script, { workerData: data });
  // From source: tsx does not reach into threads by itself.
  const source = `import('tsx/esm/api').then((tsx) => { tsx.register(); return import(${JSON.stringify(script.href)}); })`;
  return new Worker(source, { eval: true, workerData: data });
}
