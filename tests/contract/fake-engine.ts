import type {
  EmittedToken,
  EngineEvent,
  EngineHandle,
  EngineRequest,
  EngineState,
  EngineStats,
  PrewarmRequest,
  RequestProgress,
  ThinkingControl,
} from '../../server/engine/request.js';

/** What a scripted sequence does: events without requestId; a promise is waited for. */
export type Script = (request: EngineRequest) => Iterable<Partial<EngineEvent> | Promise<void>>;

/** An engine that plays a script for each request and remembers what it was asked and told. */
export class FakeEngine implements EngineHandle {
  readonly requests: EngineRequest[] = [];
  readonly aborted: string[] = [];
  readonly prewarms: PrewarmRequest[] = [];
  readonly controls: [requestId: string, control: ThinkingControl][] = [];
  script: Script;
  submitError: Error | null = null;
  engineState: EngineState = { status: 'ready', device: 'fake', weightBytes: 1, cacheBytes: 1, maxContext: 4096 };
  numOpen = 0;
  requestProgress: RequestProgress | null = null;
  readonly #ended = new Set<string>();

  constructor(script: Script) {
    this.script = script;
  }

  submit(request: EngineRequest): AsyncIterable<EngineEvent> {
    if (this.submitError) throw this.submitError;
    this.requests.push(request);
    const events = this.#play(request);
    return {
      [Symbol.asyncIterator]: () => ({
        next: () => events.next(),
        return: async () => {
          if (!this.#ended.has(request.requestId)) this.aborted.push(request.requestId);
          void events.return(undefined);
          return { value: undefined, done: true };
        },
      }),
    };
  }

  async *#play(request: EngineRequest): AsyncGenerator<EngineEvent> {
    const { requestId } = request;
    this.numOpen++;
    try {
      for (const step of this.script(request)) {
        if (this.aborted.includes(requestId)) {
          yield { requestId, tokens: [], cachedTokens: 0, finishReason: 'abort' };
          return;
        }
        if (step instanceof Promise) {
          await step;
          continue;
        }
        if (step.finishReason !== undefined) this.#ended.add(requestId);
        yield { requestId, tokens: [], cachedTokens: 0, ...step };
      }
    } finally {
      this.numOpen--;
    }
  }

  abort(requestId: string): void {
    this.aborted.push(requestId);
  }

  control(requestId: string, control: ThinkingControl): void {
    this.controls.push([requestId, control]);
  }

  prewarm(prewarm: PrewarmRequest): void {
    this.prewarms.push(prewarm);
  }

  progress(): RequestProgress | null {
    return this.requestProgress;
  }

  state(): EngineState {
    return this.engineState;
  }

  stats(): EngineStats {
    return {
      numRunning: this.numOpen,
      numWaiting: 0,
      numBlocks: 10,
      numFreeBlocks: 7,
      numCachedBlocks: 1,
      blockSize: 64,
      numSteps: 5,
      numPreemptions: 0,
      promptTokens: 11,
      generationTokens: 12,
      prewarmedTokens: 0,
      prefixCacheQueries: 13,
      specNumDrafts: 0,
      specNumDraftTokens: 0,
      specNumAcceptedTokens: 0,
      specAcceptedPerPos: [0, 0, 0, 0],
      prefixCacheHits: 4,
      numRestarts: 0,
    };
  }

  async ready(): Promise<void> {}

  async close(): Promise<void> {}
}

/** One event a token, the last with its reason. */
export function oneByOne(tokens: readonly EmittedToken[], finishReason: 'stop' | 'length' = 'stop'): Script {
  return function* () {
    for (const [index, token] of tokens.entries()) {
      yield { tokens: [token], cachedTokens: 2, ...(index === tokens.length - 1 ? { finishReason } : {}) };
    }
  };
}
