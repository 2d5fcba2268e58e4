import type { AddressInfo } from 'node:net';
import { hostname } from 'node:os';
import type { FastifyInstance } from 'fastify';
import { Drain } from './api/drain.js';
import { DatabaseResponses } from './api/response-database.js';
import type { ResponseStore } from './api/response-store.js';
import { buildApp, type AppOptions } from './app.js';
import { packageVersion, type ServeConfig } from './config.js';
import { EngineClient } from './engine/process.js';
import { StartupError } from './errors.js';
import { readAddress } from './kv-events/address.js';
import { KvEvents } from './kv-events/kv-events.js';
import { usableCores } from './machine.js';
import type { Checkpoint } from './model/spec.js';
import { readWeights } from './model/synthetic.js';
import { CompletionTracer } from './telemetry/completion-trace.js';
import { OtlpExporter } from './telemetry/otlp.js';
import { PromptEncoder } from './text/prompt-encoder.js';

/** Everything that serves one checkpoint: engine process, HTTP application, and whoever is told what they do. */
export class Server {
  readonly config: ServeConfig;
  readonly checkpoint: Checkpoint;
  readonly engine: EngineClient;
  readonly app: FastifyInstance;
  readonly drain = new Drain();
  readonly #prompts: PromptEncoder;
  readonly #kvEvents: KvEvents | null;
  readonly #exporter: OtlpExporter | null;
  /** null: they are the application's own, in memory */
  readonly #responses: ResponseStore | null;

  private constructor(config: ServeConfig, logger: AppOptions['logger'], parts: Parts) {
    const { checkpoint, prompts, kvEvents, responses } = parts;
    this.config = config;
    this.checkpoint = checkpoint;
    this.#prompts = prompts;
    this.#kvEvents = kvEvents;
    this.#responses = responses;
    const log = (line: string): void => this.app.log.warn(line);
    parts.log = log;
    this.engine = new EngineClient({
      config: {
        model: checkpoint.folder,
        weights: config.weights,
        device: config.device,
        compute: config.compute,
        cpuPath: 'auto',
        numThreads: config.threads ?? usableCores(),
        blockSize: config.blockSize,
        cacheMemory: config.cacheMemory,
        gpuMemoryUtilization: config.gpuMemoryUtilization,
        kvCacheDtype: config.kvCacheDtype,
        headDtype: config.headDtype,
        deterministic: config.deterministic,
        maxModelLen: config.maxModelLen,
        maxStepTokens: config.maxStepTokens,
        maxNumSeqs: config.maxNumSeqs,
        maxQueue: config.maxQueue,
        speculativeTokens: config.speculativeTokens,
        hasCacheEvents: kvEvents !== null,
      },
      ...(kvEvents === null ? {} : { onCacheEvents: (events) => kvEvents.publish(events) }),
      log,
    });
    const { otlpTracesEndpoint: url } = config;
    const serviceVersion = packageVersion();
    this.#exporter = url === null ? null : new OtlpExporter({ url, serviceName: 'rodin', serviceVersion, log });
    const tracer = this.#exporter === null ? {} : { tracer: new CompletionTracer(this.#exporter) };
    const { engine, drain } = this;
    this.app = buildApp({
      ...{ config, checkpoint, prompts, engine, drain },
      ...(responses ? { responses } : {}),
      ...tracer,
      ...(logger ? { logger } : {}),
    });
    for (const note of [...config.warnings, ...checkpoint.notes]) log(note);
  }

  /** Reads the checkpoint and starts to load it. Throws StartupError for what cannot be served or listened on. */
  static async create(config: ServeConfig, logger?: AppOptions['logger']): Promise<Server> {
    const checkpoint = readWeights(config.model, config.weights);
    const prompts = PromptEncoder.read(config.model, config.reasoningFormat === 'r1-zero' ? 'r1-zero' : 'marked');
    const parts: Parts = { checkpoint, prompts, kvEvents: null, responses: null, log: () => {} };
    try {
      parts.responses = openDatabase(config);
      parts.kvEvents = await publishCache(config, checkpoint.name, (line) => parts.log(line));
      return new Server(config, logger, parts);
    } catch (error) {
      await parts.kvEvents?.close();
      await prompts.close();
      parts.responses?.close();
      throw error;
    }
  }

  get modelName(): string {
    return this.config.servedModelNames[0] ?? this.checkpoint.name;
  }

  /** Opens the port and returns its URL; models may load for longer. Throws StartupError. */
  async listen(): Promise<string> {
    const { host, port } = this.config;
    try {
      await this.app.listen({ host, port });
    } catch (error) {
      throw listenError(host, port, error as NodeJS.ErrnoException);
    }
    const address = this.app.server.address() as AddressInfo;
    return `http://${address.family === 'IPv6' ? `[${address.address}]` : address.address}:${address.port}`;
  }

  /** Ends everything; what runs is cut off, unless it was drained before. */
  async close(): Promise<void> {
    await this.app.close();
    await this.engine.close();
    await this.#kvEvents?.close();
    await this.#exporter?.close();
    await this.#prompts.close();
    this.#responses?.close();
  }
}

/** What has to be there before the rest can be made; `log` is set when there is somewhere to log to. */
interface Parts {
  checkpoint: Checkpoint;
  prompts: PromptEncoder;
  kvEvents: KvEvents | null;
  responses: ResponseStore | null;
  log: (line: string) => void;
}

/** The database of responses where the config asks for one. Throws StartupError where it cannot be used. */
function openDatabase({ responseStore, responseStoreSize }: ServeConfig): ResponseStore | null {
  return responseStore === null ? null : new DatabaseResponses(responseStore, responseStoreSize);
}

/** Publishes cache events where the config asks for it; null where it does not. */
async function publishCache(
  { kvEvents, kvEventsTopic, servedModelNames, blockSize }: ServeConfig,
  folder: string,
  log: (line: string) => void,
): Promise<KvEvents | null> {
  if (kvEvents === null) return null;
  const topic = kvEventsTopic ?? `kv@${hostname()}@${servedModelNames[0] ?? folder}`;
  try {
    return await KvEvents.listen({ ...readAddress(kvEvents), topic, blockSize, log });
  } catch (error) {
    throw new StartupError(`--kv-events ${kvEvents} cannot be listened on: ${(error as Error).message}.`);
  }
}

function listenError(host: string, port: number, { code, message }: NodeJS.ErrnoException): StartupError {
  if (code === 'EADDRINUSE') return new StartupError(`Port ${port} on ${host} is in use; give another with --port.`);
  if (code === 'EADDRNOTAVAIL' || code === 'ENOTFOUND') {
    return new StartupError(`This machine has no address ${host}; give another with --host.`);
  }
  if (code === 'EACCES') {
    return new StartupError(`Port ${port} may not be used by this account; give another with --port.`);
  }
  return new StartupError(`The server cannot listen on ${host}:${port}: ${message}`);
}
