import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { pooled, Server } from './server.js';

const NUM_MOMENTS = 40;
const EXTENSION = 250;
const server = await Server.start();
after(async () => {
  assert.equal(await server.stop(), 0);
});

const QUESTIONS = ['What is 577 × 63?', 'Sort these numbers: 52, 17, 88, 3, 41', 'Evaluate (2 + 4) * 4.'];

interface Heard {
  reasoning: string;
  content: string;
  numCalls: number;
  finish: string | null;
  ended: string | null;
  numReasoning: number;
}

function control(id: string, body: object): Promise<Response> {
  return fetch(`${server.url}/v1/chat/completions/${id}/control`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify(body),
  });
}

/** Streams an answer; onFirst is called with its id and what has been heard so far. */
async function listen(body: object, onFirst: (id: string, heard: Heard) => Promise<void>): Promise<Heard> {
  const response = await server.chat({ ...body, stream: true, stream_options: { include_usage: true } });
  assert.equal(response.status, 200);
  const heard: Heard = { reasoning: '', content: '', numCalls: 0, finish: null, ended: null, numReasoning: 0 };
  let steering: Promise<void> | null = null;
  let text = '';
  for await (const part of response.body!.pipeThrough(new TextDecoderStream())) {
    text += part;
    const events = text.split('\n\n');
    text = events.pop()!;
    for (const event of events) {
      const data = /^data: (\{.*\})$/m.exec(event)?.[1];
      if (data === undefined) continue;
      const { id, choices, usage, error } = JSON.parse(data);
      assert.equal(error, undefined);
      const [choice] = choices;
      heard.reasoning += choice?.delta.reasoning_content ?? '';
      heard.content += choice?.delta.content ?? '';
      heard.numCalls += choice?.delta.tool_calls?.length ?? 0;
      heard.finish ??= choice?.finish_reason ?? null;
      heard.ended ??= choice?.reasoning_ended ?? null;
      heard.numReasoning = usage?.completion_tokens_details.reasoning_tokens ?? heard.numReasoning;
      steering ??= onFirst(id, heard);
    }
  }
  await steering;
  return heard;
}

test(`thinking is extended, and ended at ${NUM_MOMENTS} moments with a complete answer to what had been sent`, async (context) => {
  const moments = Array.from({ length: NUM_MOMENTS }, (_, index) => index);
  let numEnded = 0;
  await pooled(moments, 4, async (moment) => {
    let before = '';
    let wasEnded = false;
    const messages = [{ role: 'user', content: QUESTIONS[moment % QUESTIONS.length] }];
    const request = { temperature: 1, seed: moment, messages };
    const heard = await listen(request, async (id, soFar) => {
      const extended = await control(id, { action: 'extend_thinking', tokens: EXTENSION });
      if ([404, 409].includes(extended.status)) return; // the answer or the thought was over already
      assert.deepEqual(await extended.json(), {
        id,
        object: 'chat.completion.control',
        action: 'extend_thinking',
        choices: [0],
      });
      await sleep(2 * moment);
      before = soFar.reasoning;
      const ended = await control(id, { action: 'end_thinking' });
      wasEnded = ended.status === 200;
      if (!wasEnded) assert.ok([404, 409].includes(ended.status));
    });
    // Some calls a tool of the tasks that the model was trained for, at this temperature.
    if (heard.finish === 'tool_calls') assert.ok(heard.numCalls > 0);
    else assert.deepEqual([heard.finish, heard.content.trim() === ''], ['stop', false]);
    assert.ok(heard.reasoning.startsWith(before));
    if (heard.ended !== 'client') return;
    assert.ok(wasEnded);
    numEnded++;
    assert.ok(!heard.reasoning.includes('That is enough thinking'));
  });
  context.diagnostic(`${numEnded} of ${NUM_MOMENTS} ended by the client`);
  assert.ok(numEnded > NUM_MOMENTS / 2, `${numEnded} of ${NUM_MOMENTS} ended`);
});

test('extended thinking has more reasoning before the answer', async () => {
  const messages = [{ role: 'user', content: QUESTIONS[0] }];
  const plain = await listen({ temperature: 0, messages }, async () => {});
  let isExtended = false;
  const longer = await listen({ temperature: 0, messages }, async (id) => {
    isExtended = (await control(id, { action: 'extend_thinking', tokens: EXTENSION })).status === 200;
  });
  assert.ok(isExtended);
  assert.ok(plain.numReasoning < EXTENSION && longer.numReasoning > EXTENSION, `${longer.numReasoning}`);
  assert.match(longer.reasoning, /Wait, let me check that again/);
  assert.notEqual(longer.content, '');
});

test('what cannot be steered is refused', async () => {
  const missing = await control('chatcmpl-none', { action: 'end_thinking' });
  assert.equal(missing.status, 404);
  const body = { messages: [{ role: 'user', content: QUESTIONS[0] }], ignore_eos: true, max_tokens: 1000 };
  await listen({ ...body, thinking: { type: 'disabled' } }, async (id) => {
    for (const [sent, status, param] of [
      [{ action: 'end_thinking' }, 409, 'action'],
      [{ action: 'end_thinking', tokens: 3 }, 400, 'tokens'],
      [{ action: 'extend_thinking' }, 400, 'tokens'],
      [{ action: 'extend_thinking', tokens: 1e9 }, 400, 'tokens'],
      [{ action: 'extend_thinking', tokens: 0 }, 400, 'tokens'],
      [{ action: 'think_again' }, 400, 'action'],
      [{ action: 'end_thinking', index: 1 }, 400, 'index'],
    ] as const) {
      const response = await control(id, sent);
      const { error } = (await response.json()) as any;
      assert.deepEqual([response.status, error.param], [status, param], JSON.stringify(sent));
    }
  });
});
