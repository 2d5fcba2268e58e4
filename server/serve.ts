import type { ServeConfig } from './config.js';
import type { EngineClient } from './engine/process.js';
import { textLog } from './log.js';
import { LoadingProgress, sizeText } from './progress.js';
import { Server } from './server.js';

const PROGRESS_INTERVAL_MS = 100;

/**
 * Serves until a signal has come and everything has ended; resolves with the exit code. The port is open while the
 * model loads, so that /health can say so.
 */
export async function serve(config: ServeConfig): Promise<number> {
  const startedAt = performance.now();
  const isText = config.logFormat === 'text' || (config.logFormat === 'auto' && process.stderr.isTTY);
  const stream = isText ? textLog(process.stderr) : process.stderr;
  const server = await Server.create(config, { level: config.logLevel, stream });
  try {
    const stopped = nextSignal();
    const { log: logger } = server.app;
    const url = await server.listen();
    logger.info(`loading ${server.checkpoint.folder}`);

    const isReady = await Promise.race([
      showLoading(server.engine, (line) => logger.info(line)),
      stopped.then(() => false),
    ]);
    const state = server.engine.state();
    if (state.status === 'ready' && state.deviceNote !== undefined) logger.info(state.deviceNote);
    if (isReady) printReady(url, server, performance.now() - startedAt);
    const signal = await stopped;
    logger.info(`${signal}: finishing ${server.drain.numRunning} completions, for at most ${config.shutdownTimeout} s`);
    await server.drain.begin(config.shutdownTimeout * 1000);
    return 0;
  } finally {
    await server.close();
  }
}

function nextSignal(): Promise<'SIGTERM' | 'SIGINT'> {
  return new Promise((resolve) => {
    for (const signal of ['SIGTERM', 'SIGINT'] as const) process.once(signal, () => resolve(signal));
  });
}

async function showLoading(engine: EngineClient, log: (line: string) => void): Promise<true> {
  const progress = new LoadingProgress(process.stderr, log);
  const timer = setInterval(() => {
    const state = engine.state();
    if (state.status === 'loading') progress.update(state.loadedBytes, state.totalBytes);
  }, PROGRESS_INTERVAL_MS);
  try {
    await engine.ready();
    return true;
  } finally {
    clearInterval(timer);
    progress.end();
  }
}

function printReady(url: string, { engine, config, modelName }: Server, milliseconds: number): void {
  const state = engine.state();
  const about =
    state.status === 'ready'
      ? `${state.device}, ${sizeText(state.weightBytes)} of weights, ${sizeText(state.cacheBytes)} of cache, `
      : '';
  const key = config.apiKeys.length ? ` -H 'authorization: Bearer KEY'` : '';
  const body = JSON.stringify({ model: modelName, messages: [{ role: 'user', content: 'What is 577 × 63?' }] });
  process.stdout.write(
    `Rodin serves ${modelName} on ${url} (${about}ready in ${(milliseconds / 1000).toFixed(1)} s). Try:\n\n` +
      `  curl ${url}/v1/chat/completions${key} -H 'content-type: application/json' \\\n    -d '${body.replaceAll("'", "'\\''")}'\n\n`,
  );
}
