import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { fixture, pooled, readEvents, Server } from './server.js';

const NUM_ANSWERS = 24;
const server = await Server.start('--max-num-seqs', '8');
after(async () => {
  assert.equal(await server.stop(), 0);
});

async function replay(body: object): Promise<any> {
  const response = await fetch(`${server.url}/v1/replay`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify(body),
  });
  assert.equal(response.status, 200, response.status === 200 ? '' : await response.clone().text());
  return response.json();
}

test('answers of a crowd come out the same alone and in another crowd, whatever was asked of them', async () => {
  const questions = fixture('eval.jsonl').slice(0, NUM_ANSWERS);
  const kinds = [
    { temperature: 1 },
    { temperature: 1.3, top_k: 40, presence_penalty: 0.3 },
    { temperature: 1, thinking_budget: 20 },
    { temperature: 1, stop: ['3'] },
    { temperature: 1, response_format: { type: 'json_object' }, max_tokens: 600 },
  ];
  const answers = await pooled(questions, 8, async ({ messages, tools }) => {
    const kind = kinds[messages[0].content.length % kinds.length]!;
    return server.json({ messages, ...(tools ? { tools } : {}), ...kind });
  });
  const alone = await pooled(answers.slice(0, 6), 1, ({ id }) => replay({ id }));
  const crowd = await pooled(answers, 8, ({ id }) => replay({ id }));
  for (const [index, answer] of [...alone, ...crowd].entries()) {
    assert.deepEqual([answer.is_identical, answer.difference], [true, null], `${index}`);
    assert.ok(answer.num_tokens > 0);
  }
});

test('an answer that its client has steered comes out the same', async () => {
  const control = (id: string, body: object): Promise<Response> =>
    fetch(`${server.url}/v1/chat/completions/${id}/control`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify(body),
    });
  const messages = [{ role: 'user', content: 'What is 577 × 63?' }];
  const steered: Promise<Response>[] = [];
  const { events } = await readEvents(
    await server.chat({ messages, temperature: 1, seed: 4, stream: true }),
    (event) => {
      if (steered.length === 0) steered.push(control(event.id, { action: 'extend_thinking', tokens: 150 }));
    },
  );
  assert.equal((await steered[0])!.status, 200);
  const { id } = events[0];
  assert.equal((await replay({ id })).is_identical, true);
  // Without what the client has asked, it is another one.
  const text = events.map(({ choices }) => choices[0].delta.reasoning_content ?? '').join('');
  assert.match(text, /Wait, let me check that again/);
});

test('another seed gives other tokens, and the first of them is told', async () => {
  const request = {
    model: 'pocket-r1',
    messages: [{ role: 'user', content: 'What is 577 × 63?' }],
    temperature: 2,
    top_p: 1,
  };
  const { choices, seed } = await server.json({ ...request, return_token_ids: true });
  const tokenIds = choices[0].token_ids;
  assert.equal((await replay({ request, seed, token_ids: tokenIds })).is_identical, true);
  let other: any;
  for (let step = 1; step < 50 && other?.is_identical !== false; step++) {
    other = await replay({ request, seed: seed + step, token_ids: tokenIds });
  }
  assert.equal(other.is_identical, false);
  const { position, expected, actual } = other.difference;
  assert.equal(expected.token_id, tokenIds[position]);
  assert.notEqual(actual?.token_id, expected.token_id);
  assert.equal((await replay({ request, seed })).is_identical, true);
});
