import assert from 'node:assert/strict';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { test } from 'node:test';
import { OtlpExporter, type Span } from '../../server/telemetry/otlp.js';
import { readTraceContext } from '../../server/telemetry/trace-context.js';

const TRACE = '4bf92f3577b34da6a3ce929d0e0e4736';
const PARENT = '00f067aa0ba902b7';

/** A collector that answers with the given statuses, the last one for ever, and keeps what it took. */
class Collector {
  readonly bodies: any[] = [];
  readonly types: (string | undefined)[] = [];
  readonly #statuses: number[];
  readonly #server: Server;

  private constructor(statuses: number[]) {
    this.#statuses = statuses;
    this.#server = createServer((request, response) => {
      const status = this.#statuses.length > 1 ? this.#statuses.shift()! : this.#statuses[0]!;
      let text = '';
      request.on('data', (part: Buffer) => (text += part.toString()));
      request.on('end', () => {
        this.types.push(request.headers['content-type']);
        if (status === 200) this.bodies.push(JSON.parse(text));
        response.writeHead(status, { 'content-type': 'application/json' }).end('{}');
      });
    });
  }

  static async start(...statuses: number[]): Promise<Collector> {
    const collector = new Collector(statuses);
    await new Promise<void>((resolve) => collector.#server.listen(0, '127.0.0.1', resolve));
    return collector;
  }

  get url(): string {
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}/v1/traces`;
  }

  get spans(): any[] {
    return this.bodies.flatMap((body) => body.resourceSpans[0].scopeSpans[0].spans);
  }

  async close(): Promise<void> {
    this.#server.closeAllConnections();
    await new Promise((resolve) => this.#server.close(resolve));
  }
}

function span(name: string): Span {
  return {
    traceId: TRACE,
    spanId: PARENT,
    parentSpanId: null,
    name,
    kind: 'server',
    startMs: 1_700_000_000_000.123,
    endMs: 1_700_000_000_001,
    attributes: { text: 'a', whole: 3, part: 0.5, yes: true, list: ['b'] },
    error: null,
  };
}

function exporterTo(url: string, log: (line: string) => void = () => {}): OtlpExporter {
  return new OtlpExporter({ url, serviceName: 'rodin', serviceVersion: '1', log, flushMs: 3_600_000 });
}

test("a caller's trace goes on; whatever is no trace begins a new one", () => {
  assert.deepEqual(readTraceContext(`00-${TRACE}-${PARENT}-01`), {
    traceId: TRACE,
    parentSpanId: PARENT,
    isSampled: true,
  });
  assert.equal(readTraceContext(`00-${TRACE}-${PARENT}-00`).isSampled, false);
  assert.equal(readTraceContext(`cc-${TRACE}-${PARENT}-03-what-comes`).traceId, TRACE);
  for (const header of [
    undefined,
    '',
    'nonsense',
    `ff-${TRACE}-${PARENT}-01`,
    `00-${TRACE}-${PARENT}-01-more`,
    `00-${'0'.repeat(32)}-${PARENT}-01`,
    `00-${TRACE}-${'0'.repeat(16)}-01`,
    `00-${TRACE.toUpperCase()}-${PARENT}-01`,
    [`00-${TRACE}-${PARENT}-01`],
  ]) {
    const { traceId, parentSpanId, isSampled } = readTraceContext(header);
    assert.match(traceId, /^[0-9a-f]{32}$/);
    assert.notEqual(traceId, TRACE);
    assert.deepEqual([parentSpanId, isSampled], [null, true]);
  }
});

test('spans arrive as OTLP says it in JSON', async () => {
  const collector = await Collector.start(200);
  const exporter = exporterTo(collector.url);
  try {
    exporter.add([span('whole'), { ...span('part'), kind: 'internal', parentSpanId: PARENT, error: 'engine_failed' }]);
    await exporter.flush();
    assert.deepEqual(collector.types, ['application/json']);
    assert.deepEqual(collector.bodies, [
      {
        resourceSpans: [
          {
            resource: {
              attributes: [
                { key: 'service.name', value: { stringValue: 'rodin' } },
                { key: 'service.version', value: { stringValue: '1' } },
              ],
            },
            scopeSpans: [{ scope: { name: 'rodin', version: '1' }, spans: collector.spans }],
          },
        ],
      },
    ]);
    const [whole, part] = collector.spans;
    assert.deepEqual(whole, {
      traceId: TRACE,
      spanId: PARENT,
      name: 'whole',
      kind: 2,
      startTimeUnixNano: '1700000000000123000',
      endTimeUnixNano: '1700000000001000000',
      attributes: [
        { key: 'text', value: { stringValue: 'a' } },
        { key: 'whole', value: { intValue: '3' } },
        { key: 'part', value: { doubleValue: 0.5 } },
        { key: 'yes', value: { boolValue: true } },
        { key: 'list', value: { arrayValue: { values: [{ stringValue: 'b' }] } } },
      ],
    });
    assert.deepEqual([part.kind, part.parentSpanId, part.status], [1, PARENT, { code: 2, message: 'engine_failed' }]);
  } finally {
    await exporter.close();
    await collector.close();
  }
});

test('a collector that is busy gets them again; one that refuses them loses them', async () => {
  const said: string[] = [];
  const collector = await Collector.start(503, 200, 400);
  const exporter = exporterTo(collector.url, (line) => said.push(line));
  try {
    exporter.add([span('a')]);
    await exporter.flush();
    assert.equal(collector.spans.length, 0);
    await exporter.flush();
    assert.deepEqual(
      collector.spans.map(({ name }) => name),
      ['a'],
    );
    exporter.add([span('b')]);
    await exporter.flush();
    assert.equal(exporter.numLost, 1);
    assert.match(said[0]!, /answered 503; they are sent again/);
    assert.equal(said.length, 1, 'one line a minute');
  } finally {
    await exporter.close();
    await collector.close();
  }
});

test('a collector that is away costs the oldest spans, and no time at the end', async () => {
  const said: string[] = [];
  const exporter = exporterTo('http://127.0.0.1:9/v1/traces', (line) => said.push(line));
  for (let index = 0; index < 9000; index++) exporter.add([span(`${index}`)]);
  const start = performance.now();
  await exporter.close();
  assert.ok(performance.now() - start < 5000);
  assert.equal(exporter.numLost, 9000);
  assert.match(said[0]!, /^trace spans: .*(cannot be reached|wait)/);
});
