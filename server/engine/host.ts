import { ApiError, StartupError } from '../errors.js';
import type { Engine } from './engine.js';
import type { ChildMessage, ParentMessage, ParentRequest } from './messages.js';
import type { EngineConfig, LoadProgress } from './start-engine.js';

type StepMessage = Extract<ChildMessage, { type: 'step' }>;

export type StartEngine = (config: EngineConfig, onProgress: LoadProgress) => Promise<Engine>;

const HEARTBEAT_MS = 1000;

/**
 * The engine process's side of the channel: starts an engine when told to, passes requests in and one message of
 * events per step out. `exit` ends this process. It ends itself at once when the channel closes, whatever the native
 * threads are doing, so that no API process leaves an orphan behind.
 */
export function hostEngine(start: StartEngine, exit: (code: number) => void): void {
  let engine: Engine | null = null;

  const send = (message: ChildMessage, onSent?: () => void) => {
    if (process.connected) process.send!(message, undefined, undefined, onSent);
  };
  const fail = (message: string, isStartup: boolean) => send({ type: 'failed', message, isStartup }, () => exit(1));
  const sendEvents = (events: StepMessage['events'], rest: Pick<StepMessage, 'progress'> = {}) => {
    if (engine === null) return;
    const cacheEvents = engine.takeCacheEvents();
    const cached = cacheEvents.length > 0 ? { cacheEvents } : {};
    send({ type: 'step', events, stats: engine.stats(), ...cached, ...rest });
  };

  process.on('disconnect', () => process.kill(process.pid, 'SIGKILL'));
  // A terminal's Ctrl-C reaches the whole group; when to stop is the API process's decision.
  process.on('SIGINT', () => {});
  process.on('SIGTERM', () => {});
  process.on('message', (message: ParentMessage) => {
    switch (message.type) {
      case 'start':
        void boot(message.config);
        break;
      case 'requests':
        for (const request of message.requests) if (engine !== null) pass(engine, request);
        break;
      case 'close':
        void (engine?.close() ?? Promise.resolve()).then(() => exit(0));
    }
  });

  async function boot(config: EngineConfig): Promise<void> {
    try {
      engine = await start(config, (loadedBytes, totalBytes) => send({ type: 'progress', loadedBytes, totalBytes }));
    } catch (error) {
      if (error instanceof StartupError) return fail(error.message, true);
      return fail((error as Error).stack ?? String(error), false);
    }
    engine.onEvents = sendEvents;
    engine.onFailed = (reason) => fail(reason, false);
    const state = engine.state();
    if (state.status !== 'ready') return fail('The engine stopped before its first request.', false);
    const running = engine;
    const { device, deviceNote, weightBytes, cacheBytes } = state;
    const note = deviceNote === undefined ? {} : { deviceNote };
    sendEvents([]); // stats are known before anybody is told that it is ready
    send({ type: 'ready', info: { device, ...note, weightBytes, cacheBytes, limits: engine.limits } });
    setInterval(() => sendEvents([], { progress: running.allProgress() }), HEARTBEAT_MS);
  }

  /** Nothing that one request does may end the process. */
  function pass(target: Engine, message: ParentRequest): void {
    if (message.type === 'abort') return target.abort(message.requestId);
    if (message.type === 'prewarm') return target.prewarm(message.prewarm);
    if (message.type === 'control') return target.control(message.requestId, message.control);
    try {
      target.enqueue(message.request);
    } catch (error) {
      const code = error instanceof ApiError ? error.code : 'internal_error';
      const { requestId } = message.request;
      const failure = { code, message: (error as Error).message };
      sendEvents([{ requestId, tokens: [], cachedTokens: 0, finishReason: 'error', error: failure }]);
    }
  }
}
