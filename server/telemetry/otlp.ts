/** Spans -> an OpenTelemetry collector, by OTLP over HTTP with JSON bodies. */

export type AttributeValue = string | boolean | number | readonly string[];

export interface Span {
  traceId: string;
  spanId: string;
  parentSpanId: string | null;
  name: string;
  kind: 'internal' | 'server';
  /** Unix milliseconds */
  startMs: number;
  endMs: number;
  attributes: Readonly<Record<string, AttributeValue>>;
  /** what went wrong; null where nothing did */
  error: string | null;
}

export interface OtlpOptions {
  /** of the collector's traces: http://localhost:4318/v1/traces */
  url: string;
  serviceName: string;
  serviceVersion: string;
  log?: (line: string) => void;
  flushMs?: number;
}

const FLUSH_MS = 1000;
const REQUEST_TIMEOUT_MS = 10_000;
const CLOSE_TIMEOUT_MS = 2000;
const MAX_BATCH = 512;
/** spans that wait for a collector; the oldest are given up */
const MAX_WAITING = 8192;
const LOG_INTERVAL_MS = 60_000;
/** what the collector takes later */
const RETRIED = new Set([429, 502, 503, 504]);

const KINDS = { internal: 1, server: 2 } as const;
const STATUS_ERROR = 2;

/** Collects spans and sends them in batches; a collector that is slow or away costs a bounded number of spans. */
export class OtlpExporter {
  readonly #options: OtlpOptions;
  readonly #timer: NodeJS.Timeout;
  #waiting: Span[] = []; // [num_waiting]
  #sending: Promise<void> | null = null;
  #numLost = 0;
  #loggedAt = -Infinity;

  constructor(options: OtlpOptions) {
    this.#options = options;
    this.#timer = setInterval(() => void this.flush(), options.flushMs ?? FLUSH_MS);
    this.#timer.unref();
  }

  /** Spans that no collector has taken. */
  get numLost(): number {
    return this.#numLost;
  }

  add(spans: readonly Span[]): void {
    this.#waiting.push(...spans);
    const numOver = this.#waiting.length - MAX_WAITING;
    if (numOver > 0) {
      this.#waiting.splice(0, numOver);
      this.#lose(numOver, `more than ${MAX_WAITING} wait`);
    }
    if (this.#waiting.length >= MAX_BATCH) void this.flush();
  }

  /** Sends what waits; resolves when that is over, whatever became of it. */
  async flush(timeoutMs = REQUEST_TIMEOUT_MS): Promise<void> {
    this.#sending ??= this.#sendAll(timeoutMs).finally(() => (this.#sending = null));
    await this.#sending;
  }

  async close(): Promise<void> {
    clearInterval(this.#timer);
    await this.flush(CLOSE_TIMEOUT_MS);
    await this.flush(CLOSE_TIMEOUT_MS); // what came while the one before was on its way
    if (this.#waiting.length > 0) this.#lose(this.#waiting.length, 'the server ends');
  }

  async #sendAll(timeoutMs: number): Promise<void> {
    while (this.#waiting.length > 0) {
      const batch = this.#waiting.splice(0, MAX_BATCH);
      const problem = await this.#send(batch, timeoutMs);
      if (problem === null) continue;
      if (problem.isLater) {
        this.#waiting.unshift(...batch);
        this.#tell(`${problem.reason}; they are sent again`);
        return;
      }
      this.#lose(batch.length, problem.reason);
    }
  }

  async #send(batch: readonly Span[], timeoutMs: number): Promise<{ reason: string; isLater: boolean } | null> {
    const { url, serviceName, serviceVersion } = this.#options;
    const resource = attributesOf({ 'service.name': serviceName, 'service.version': serviceVersion });
    const scope = { name: 'rodin', version: serviceVersion };
    const body = JSON.stringify({
      resourceSpans: [{ resource: { attributes: resource }, scopeSpans: [{ scope, spans: batch.map(spanBody) }] }],
    });
    try {
      const response = await fetch(url, {
        method: 'POST',
        headers: { 'content-type': 'application/json' },
        body,
        signal: AbortSignal.timeout(timeoutMs),
      });
      await response.arrayBuffer();
      if (response.ok) return null;
      return { reason: `${url} answered ${response.status}`, isLater: RETRIED.has(response.status) };
    } catch (error) {
      const cause = ((error as Error).cause as Error | undefined)?.message ?? (error as Error).message;
      return { reason: `${url} cannot be reached: ${cause}`, isLater: true };
    }
  }

  #lose(count: number, reason: string): void {
    this.#numLost += count;
    this.#tell(`${reason}; ${this.#numLost} are lost so far`);
  }

  #tell(text: string): void {
    if (performance.now() - this.#loggedAt < LOG_INTERVAL_MS) return;
    this.#loggedAt = performance.now();
    this.#options.log?.(`trace spans: ${text}`);
  }
}

function spanBody({ traceId, spanId, parentSpanId, name, kind, startMs, endMs, attributes, error }: Span): object {
  return {
    traceId,
    spanId,
    ...(parentSpanId === null ? {} : { parentSpanId }),
    name,
    kind: KINDS[kind],
    startTimeUnixNano: nanos(startMs),
    endTimeUnixNano: nanos(endMs),
    attributes: attributesOf(attributes),
    ...(error === null ? {} : { status: { code: STATUS_ERROR, message: error } }),
  };
}

/** 64-bit numbers are text in this format. */
function nanos(ms: number): string {
  return String(BigInt(Math.round(ms * 1000)) * 1000n);
}

function attributesOf(attributes: Readonly<Record<string, AttributeValue>>): object[] {
  return Object.entries(attributes).map(([key, value]) => ({ key, value: valueBody(value) }));
}

function valueBody(value: AttributeValue): object {
  if (typeof value === 'string') return { stringValue: value };
  if (typeof value === 'boolean') return { boolValue: value };
  if (typeof value === 'number') return Number.isInteger(value) ? { intValue: String(value) } : { doubleValue: value };
  return { arrayValue: { values: value.map((item) => ({ stringValue: item })) } };
}
