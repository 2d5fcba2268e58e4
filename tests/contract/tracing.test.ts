import assert from 'node:assert/strict';
import { setTimeout as sleep } from 'node:timers/promises';
import { test } from 'node:test';
import { CompletionTracer } from '../../server/telemetry/completion-trace.js';
import type { Span } from '../../server/telemetry/otlp.js';
import { oneByOne, type Script } from './fake-engine.js';
import { QUESTION, startHarness } from './harness.js';

const TRACE = '4bf92f3577b34da6a3ce929d0e0e4736';
const PARENT = '00f067aa0ba902b7';

function traced(options: Parameters<typeof startHarness>[0] = {}) {
  const spans: Span[] = [];
  const lines: any[] = [];
  const tracer = new CompletionTracer({ add: (more) => void spans.push(...more) });
  const logger = { level: 'info', stream: { write: (line: string) => void lines.push(JSON.parse(line)) } };
  return { spans, lines, ...startHarness({ tracer, logger, ...options }) };
}

/** The harness's script, as an engine with a clock plays it: the first event says how long its sequence waited. */
function waited(script: Script): Script {
  return function* (request) {
    yield sleep(5);
    let isFirst = true;
    for (const step of script(request)) {
      yield step instanceof Promise || !isFirst ? step : { ...step, queueMs: 0.25 };
      isFirst = false;
    }
  };
}

test("a completion's spans tell its queue, prefill and decode, in the caller's trace", async () => {
  const { chat, engine, spans, lines, close } = traced();
  engine.script = waited(engine.script);
  try {
    const { status } = await chat(
      { ...QUESTION, temperature: 0.5, seed: 7, max_tokens: 50 },
      { traceparent: `00-${TRACE}-${PARENT}-01`, 'x-request-id': 'their-name:1' },
    );
    assert.equal(status, 200);
    const [whole, ...parts] = spans as [Span, ...Span[]];
    assert.deepEqual(
      [whole.name, whole.kind, whole.traceId, whole.parentSpanId, whole.error],
      ['chat pocket-r1', 'server', TRACE, PARENT, null],
    );
    assert.deepEqual(
      parts.map(({ name, kind, traceId, parentSpanId }) => [name, kind, traceId, parentSpanId]),
      ['queue', 'prefill', 'decode'].map((name) => [name, 'internal', TRACE, whole.spanId]),
    );
    assert.equal(new Set(spans.map(({ spanId }) => spanId)).size, 4);
    const [queue, prefill, decode] = parts as [Span, Span, Span];
    const moments = [whole.startMs, queue.startMs, queue.endMs, prefill.endMs, decode.endMs, whole.endMs];
    assert.deepEqual(
      moments,
      moments.toSorted((a, b) => a - b),
    );
    assert.ok(Math.abs(queue.endMs - queue.startMs - 0.25) < 0.01);
    assert.equal(prefill.startMs, queue.endMs);
    assert.equal(decode.startMs, prefill.endMs);
    assert.ok(Math.abs(whole.endMs - Date.now()) < 60_000, 'Unix time');

    const { attributes } = whole;
    const line = lines.find(({ msg }) => msg === 'completion');
    assert.deepEqual(
      [attributes['gen_ai.operation.name'], attributes['gen_ai.request.model'], attributes['gen_ai.response.id']],
      ['chat', 'pocket-r1', line.completion],
    );
    assert.deepEqual(attributes['gen_ai.response.finish_reasons'], ['stop']);
    assert.deepEqual(
      ['temperature', 'seed', 'max_tokens'].map((name) => attributes[`gen_ai.request.${name}`]),
      [0.5, '7', 50],
    );
    assert.equal(attributes['gen_ai.usage.input_tokens'], line.prompt_tokens);
    assert.equal(attributes['gen_ai.usage.output_tokens'], line.completion_tokens);
    assert.equal(attributes['gen_ai.usage.reasoning.output_tokens'], line.reasoning_tokens);
    assert.equal(attributes['gen_ai.usage.cache_read.input_tokens'], 2);
    assert.deepEqual([line.trace_id, line.reqId], [TRACE, 'their-name:1']);
  } finally {
    await close();
  }
});

test('choices of one request share a trace; a trace that nobody keeps costs nothing; failures are marked', async () => {
  const { chat, engine, spans, close } = traced();
  try {
    await chat({ ...QUESTION, n: 2 });
    const wholes = spans.filter(({ kind }) => kind === 'server');
    assert.equal(wholes.length, 2);
    assert.equal(new Set(spans.map(({ traceId }) => traceId)).size, 1);
    await chat(QUESTION);
    assert.equal(new Set(spans.map(({ traceId }) => traceId)).size, 2);
    const before = spans.length;
    await chat(QUESTION, { traceparent: `00-${TRACE}-${PARENT}-00` });
    assert.equal(spans.length, before);
    engine.script = () => [{ finishReason: 'error', error: { code: 'non_finite_logits', message: 'A value.' } }];
    assert.equal((await chat(QUESTION)).status, 500);
    const failed = spans.slice(before);
    assert.deepEqual(
      failed.map(({ name }) => name),
      ['chat pocket-r1', 'queue'],
    );
    assert.equal(failed[0]!.error, 'non_finite_logits');
    assert.equal(failed[0]!.attributes['error.type'], 'non_finite_logits');
  } finally {
    await close();
  }
});

test('every response names its request, by the name that it came with where that can be used', async () => {
  const { app, chat, close } = startHarness();
  try {
    assert.equal((await chat(QUESTION, { 'x-request-id': 'abc-1' })).headers['x-request-id'], 'abc-1');
    assert.equal((await chat('{', { 'x-request-id': 'abc-2' })).headers['x-request-id'], 'abc-2');
    for (const given of ['', 'a b', 'x'.repeat(129), 'tab\t']) {
      assert.match(
        String((await chat(QUESTION, { 'x-request-id': given })).headers['x-request-id']),
        /^req_[0-9a-f]{32}$/,
      );
    }
    const missing = await app.inject({ url: '/nowhere', headers: { 'x-request-id': 'abc-3' } });
    assert.equal(missing.headers['x-request-id'], 'abc-3');
    const messages = await app.inject({ method: 'POST', url: '/v1/messages', payload: {} });
    assert.equal(messages.headers['request-id'], messages.headers['x-request-id']);
  } finally {
    await close();
  }
});

test('metrics tell how long completions waited, were prefilled and decoded', async () => {
  const { chat, engine, app, thought, close } = startHarness();
  try {
    engine.script = waited(oneByOne(thought('Let me see.', 'It is 4.')));
    await chat(QUESTION);
    const { body } = await app.inject('/metrics');
    for (const part of ['queue', 'prefill', 'decode']) {
      assert.match(body, new RegExp(`^vllm:request_${part}_time_seconds_count\\{.*\\} 1$`, 'm'));
    }
    assert.match(body, /^vllm:request_queue_time_seconds_sum\{.*\} 0\.0002\d*$/m);
  } finally {
    await close();
  }
});
