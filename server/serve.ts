import type { AddressInfo } from 'node:net';
import { availableParallelism } from 'node:os';
import type { FastifyInstance } from 'fastify';
import { Drain } from './api/drain.js';
import { buildApp } from './app.js';
import type { ServeConfig } from './config.js';
import { EngineClient } from './engine/process.js';
import { StartupError } from './errors.js';
import { textLog } from './log.js';
import { readCheckpoint } from './model/checkpoint.js';
import { LoadingProgress, sizeText } from './progress.js';
import { PromptEncoder } from './text/prompt-encoder.js';

const PROGRESS_INTERVAL_MS = 100;

/**
 * Serves until a signal has come and everything has ended; resolves with the exit code. The port is open while the
 * model loads, so that /health can say so.
 */
export async function serve(config: ServeConfig): Promise<number> {
  const startedAt = performance.now();
  const checkpoint = readCheckpoint(config.model);
  const prompts = PromptEncoder.read(config.model, config.reasoningFormat === 'r1-zero' ? 'r1-zero' : 'marked');
  const log: { line: (line: string) => void } = { line: () => {} };
  const drain = new Drain();
  const engine = new EngineClient({
    config: {
      model: checkpoint.folder,
      device: config.device,
      compute: config.compute,
      cpuPath: 'auto',
      numThreads: config.threads ?? availableParallelism(),
      blockSize: config.blockSize,
      cacheMemory: config.cacheMemory,
      gpuMemoryUtilization: config.gpuMemoryUtilization,
      kvCacheDtype: config.kvCacheDtype,
      maxModelLen: config.maxModelLen,
      maxStepTokens: config.maxStepTokens,
      maxNumSeqs: config.maxNumSeqs,
      maxQueue: config.maxQueue,
      speculativeTokens: config.speculativeTokens,
    },
    log: (line) => log.line(line),
  });
  let app: FastifyInstance | null = null;
  try {
    const stopped = nextSignal();
    const isText = config.logFormat === 'text' || (config.logFormat === 'auto' && process.stderr.isTTY);
    const stream = isText ? textLog(process.stderr) : process.stderr;
    app = buildApp({ config, checkpoint, prompts, engine, drain, logger: { level: config.logLevel, stream } });
    const { log: logger } = app;
    log.line = (line) => logger.warn(line);
    for (const note of [...config.warnings, ...checkpoint.notes]) logger.warn(note);
    const url = await listen(app, config);
    logger.info(`loading ${checkpoint.folder}`);

    const isReady = await Promise.race([showLoading(engine, (line) => logger.info(line)), stopped.then(() => false)]);
    const state = engine.state();
    if (state.status === 'ready' && state.deviceNote !== undefined) logger.info(state.deviceNote);
    if (isReady) printReady(url, config, engine, checkpoint.name, performance.now() - startedAt);
    const signal = await stopped;
    logger.info(`${signal}: finishing ${drain.numRunning} completions, for at most ${config.shutdownTimeout} s`);
    await drain.begin(config.shutdownTimeout * 1000);
    return 0;
  } finally {
    await app?.close();
    await engine.close();
    await prompts.close();
  }
}

function nextSignal(): Promise<'SIGTERM' | 'SIGINT'> {
  return new Promise((resolve) => {
    for (const signal of ['SIGTERM', 'SIGINT'] as const) process.once(signal, () => resolve(signal));
  });
}

async function listen(app: FastifyInstance, { host, port }: ServeConfig): Promise<string> {
  try {
    await app.listen({ host, port });
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException;
    if (code === 'EADDRINUSE') throw new StartupError(`Port ${port} on ${host} is in use; give another with --port.`);
    if (code === 'EADDRNOTAVAIL' || code === 'ENOTFOUND') {
      throw new StartupError(`This machine has no address ${host}; give another with --host.`);
    }
    if (code === 'EACCES')
      throw new StartupError(`Port ${port} may not be used by this account; give another with --port.`);
    throw new StartupError(`The server cannot listen on ${host}:${port}: ${message}`);
  }
  const address = app.server.address() as AddressInfo;
  return `http://${address.family === 'IPv6' ? `[${address.address}]` : address.address}:${address.port}`;
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

function printReady(
  url: string,
  config: ServeConfig,
  engine: EngineClient,
  folder: string,
  milliseconds: number,
): void {
  const state = engine.state();
  const about =
    state.status === 'ready'
      ? `${state.device}, ${sizeText(state.weightBytes)} of weights, ${sizeText(state.cacheBytes)} of cache, `
      : '';
  const name = config.servedModelNames[0] ?? folder;
  const key = config.apiKeys.length ? ` -H 'authorization: Bearer KEY'` : '';
  const body = JSON.stringify({ model: name, messages: [{ role: 'user', content: 'What is 577 × 63?' }] });
  process.stdout.write(
    `Rodin serves ${name} on ${url} (${about}ready in ${(milliseconds / 1000).toFixed(1)} s). Try:\n\n` +
      `  curl ${url}/v1/chat/completions${key} -H 'content-type: application/json' \\\n    -d '${body.replaceAll("'", "'\\''")}'\n\n`,
  );
}
