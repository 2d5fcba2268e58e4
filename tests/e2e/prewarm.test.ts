import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { fixture, Server } from './server.js';

const BLOCK_SIZE = 16;
const servers = await Promise.all(
  [['--prewarm'], []].map((args) =>
    Server.start('--block-size', String(BLOCK_SIZE), '--speculative-tokens', '1', ...args),
  ),
);
const [warm, cold] = servers as [Server, Server];
after(async () => {
  for (const server of servers) assert.equal(await server.stop(), 0);
});

const { tools } = fixture('greedy.jsonl').find((line) => line.tools);

/** Tokens of a conversation as the template shows it, up to the next question. */
async function lengthOf(server: Server, messages: object[], rest: object): Promise<number> {
  const response = await fetch(`${server.url}/tokenize`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({
      messages: [...messages, { role: 'user', content: '' }],
      add_generation_prompt: false,
      ...rest,
    }),
  });
  return ((await response.json()) as any).count;
}

/** Until the engine has had nothing to prewarm for a while. */
async function settled(server: Server): Promise<number> {
  let last = -1;
  for (let now = 0; now !== last; await sleep(150)) {
    last = now;
    now = await server.metric('rodin:prewarmed_tokens_total');
  }
  return last;
}

test('after a long thought the next turn finds all full blocks of the conversation without it, and the thought is gone', async () => {
  const body = { temperature: 0, max_tokens: 700 };
  const first = [{ role: 'user', content: 'What is 577 × 63?' }];
  for (const server of [warm, cold]) {
    const { choices, usage } = await server.json({ ...body, messages: first });
    const { content, reasoning_content: thought } = choices[0].message;
    assert.ok(thought.length > 100);
    await settled(server);
    const history = [...first, { role: 'assistant', content }];
    const full = Math.floor((await lengthOf(server, history, {})) / BLOCK_SIZE) * BLOCK_SIZE;
    const next = await server.json({ ...body, messages: [...history, { role: 'user', content: 'What is 2 + 2?' }] });
    const cached = next.usage.prompt_tokens_details.cached_tokens;
    if (server === warm) assert.equal(cached, full);
    else assert.ok(cached < full);
    // The turn as it was thought: its first blocks are those of the prompt alone.
    const again = await server.json({ ...body, messages: first, n: 1 });
    assert.equal(again.choices[0].message.content, content);
    assert.equal(again.usage.completion_tokens, usage.completion_tokens);
  }
});

test('a turn of calls with reasoning before them is prewarmed without it when it is answered', async () => {
  const messages: any[] = [{ role: 'user', content: 'Search the web for violin.' }];
  const body = { temperature: 0, tools, max_tokens: 400 };
  const call = (await warm.json({ ...body, messages, tool_choice: 'required' })).choices[0].message;
  assert.ok(call.reasoning_content && call.tool_calls);
  messages.push({ role: 'assistant', content: call.content, tool_calls: call.tool_calls });
  for (const { id } of call.tool_calls) {
    messages.push({ role: 'tool', tool_call_id: id, content: '{"snippet": "Tara wrote 10 pages about violin"}' });
  }
  const answer = (await warm.json({ ...body, messages })).choices[0].message;
  messages.push({ role: 'assistant', content: answer.content });
  await settled(warm);
  const full = Math.floor((await lengthOf(warm, messages, { tools })) / BLOCK_SIZE) * BLOCK_SIZE;
  const next = await warm.json({ ...body, messages: [...messages, { role: 'user', content: 'Thank you!' }] });
  assert.equal(next.usage.prompt_tokens_details.cached_tokens, full);
});

test('a server without the flag computes nothing of the kind', async () => {
  await settled(warm);
  assert.ok((await warm.metric('rodin:prewarmed_tokens_total')) > 0);
  assert.equal(await cold.metric('rodin:prewarmed_tokens_total'), 0);
  assert.equal((await warm.health()).num_running, 0);
});
