import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { pooled, Server } from './server.js';

const NUM_CUTS = 200;
const server = await Server.start();
after(async () => {
  assert.equal(await server.stop(), 0);
});

interface Part {
  bytes: number;
  events: { id: string; data: string }[];
}

/** Reads up to so many bytes of a stream, then leaves; events that have not arrived whole do not count. */
async function readBytes(response: Response, maxBytes: number, leave: () => void): Promise<Part> {
  assert.equal(response.status, 200, response.status === 200 ? '' : await response.clone().text());
  const chunks: Buffer[] = [];
  let bytes = 0;
  try {
    for await (const chunk of response.body!) {
      chunks.push(Buffer.from(chunk).subarray(0, maxBytes - bytes));
      bytes += chunks.at(-1)!.length;
      if (bytes >= maxBytes) break;
    }
  } finally {
    leave();
  }
  const events: Part['events'] = [];
  const blocks = Buffer.concat(chunks).toString().split('\n\n');
  for (const block of blocks.slice(0, -1)) {
    const [, id, data] = /^id: (.*)\ndata: (.*)$/.exec(block) ?? [];
    if (data !== undefined) events.push({ id: id!, data });
  }
  return { bytes, events };
}

function open(body: object): { response: Promise<Response>; leave: () => void } {
  const controller = new AbortController();
  return {
    response: server.chat({ ...body, stream: true }, { signal: controller.signal }),
    leave: () => controller.abort(),
  };
}

function resume(lastId: string): { response: Promise<Response>; leave: () => void } {
  const controller = new AbortController();
  const response = fetch(`${server.url}/v1/chat/completions`, {
    headers: { 'last-event-id': lastId },
    signal: controller.signal,
  });
  return { response, leave: () => controller.abort() };
}

/** Text of each choice by kind, finish reasons, and whether all came in order to the end. */
function transcriptOf(events: readonly { id: string; data: string }[]): object {
  assert.deepEqual(
    events.map(({ id }) => Number(id.split(':')[1])),
    events.map((_, index) => index),
  );
  assert.equal(events.at(-1)?.data, '[DONE]');
  const choices: Record<number, { reasoning: string; content: string; finish: string | null }> = {};
  for (const { data } of events.slice(0, -1)) {
    for (const { index, delta, finish_reason: finish } of JSON.parse(data).choices) {
      const choice = (choices[index] ??= { reasoning: '', content: '', finish: null });
      choice.reasoning += delta.reasoning_content ?? '';
      choice.content += delta.content ?? '';
      choice.finish ??= finish;
    }
  }
  return choices;
}

const REQUESTS = [
  { temperature: 0, messages: [{ role: 'user', content: 'What is 577 × 63?' }] },
  { temperature: 1, seed: 5, messages: [{ role: 'user', content: 'Sort these numbers: 52, 17, 88, 3, 41' }] },
  {
    temperature: 0.7,
    seed: 9,
    n: 2,
    presence_penalty: 0.5,
    messages: [{ role: 'user', content: 'What is 23 + 948?' }],
  },
  { temperature: 1, seed: 2, thinking_budget: 12, messages: [{ role: 'user', content: 'What is 31 × 12?' }] },
];

test(`${NUM_CUTS} streams cut at a random byte, some twice, go on to the text of an uncut one`, async (context) => {
  const whole = await Promise.all(
    REQUESTS.map(async (request) => {
      const { response, leave } = open(request);
      const { bytes, events } = await readBytes(await response, Infinity, leave);
      return { bytes, transcript: transcriptOf(events) };
    }),
  );
  let state = 12345;
  const random = (limit: number): number => {
    state = (Math.imul(state, 1103515245) + 12345) & 0x7fffffff;
    return state % limit;
  };
  const cuts = Array.from({ length: NUM_CUTS }, (_, index) => {
    const at = index % REQUESTS.length;
    return {
      at,
      first: 1 + random(whole[at]!.bytes - 1),
      second: 1 + random(whole[at]!.bytes),
      isTwice: random(3) === 0,
    };
  });
  let numResumed = 0;
  await pooled(cuts, 4, async ({ at, first, second, isTwice }) => {
    const begun = open(REQUESTS[at]!);
    const { events } = await readBytes(await begun.response, first, begun.leave);
    if (events.length === 0) return; // nothing has arrived that could be named
    numResumed++;
    for (const maxBytes of isTwice ? [second, Infinity] : [Infinity]) {
      const again = resume(events.at(-1)!.id);
      events.push(...(await readBytes(await again.response, maxBytes, again.leave)).events);
      if (events.at(-1)!.data === '[DONE]') break;
    }
    assert.deepEqual(transcriptOf(events), whole[at]!.transcript, `request ${at} cut at byte ${first}`);
  });
  context.diagnostic(`${numResumed} of ${NUM_CUTS} had an event to go on behind`);
  assert.ok(numResumed > 0.9 * NUM_CUTS);
});

test('whoever comes back while the stream is still being read takes it over', async () => {
  const request = { ...REQUESTS[0]!, ignore_eos: true, max_tokens: 600 };
  const first = open(request);
  const reader = (await first.response).body!.getReader();
  const head = Buffer.from((await reader.read()).value).toString();
  const id = /^id: (.*)$/m.exec(head)![1]!;
  const second = resume(id);
  const { events } = await readBytes(await second.response, Infinity, second.leave);
  assert.equal(events.at(-1)!.data, '[DONE]');
  assert.equal(
    events[0]!.id,
    id.replace(/\d+$/, (last) => String(Number(last) + 1)),
  );
  // The first reader is cut off.
  await assert.rejects(async () => {
    while (!(await reader.read()).done);
  });
});

test('who has left frees the blocks at once, and may still come back', async () => {
  const { response, leave } = open({ ...REQUESTS[0]!, ignore_eos: true, max_tokens: 3000 });
  const { events } = await readBytes(await response, 2000, leave);
  for (let i = 0; (await server.health()).num_running > 0; i++) {
    assert.ok(i < 50, 'the sequence runs on');
    await sleep(10);
  }
  await sleep(200);
  const again = resume(events.at(-1)!.id);
  const rest = await readBytes(await again.response, 5000, again.leave);
  assert.ok(rest.events.length > 3);
});

test('what cannot be gone on with is refused', async () => {
  for (const [headers, status] of [
    [{}, 400],
    [{ 'last-event-id': 'chatcmpl-none:3' }, 404],
    [{ 'last-event-id': 'x' }, 404],
  ] as const) {
    const response = await fetch(`${server.url}/v1/chat/completions`, { headers });
    assert.equal(response.status, status);
    assert.equal(((await response.json()) as any).error.param, 'Last-Event-ID');
  }
});
