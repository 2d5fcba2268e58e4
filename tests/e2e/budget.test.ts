import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { fixture, pooled, Server } from './server.js';

/** Some of the questions at some budgets; tests/bench/budget.ts asks all 400 at all of them, which takes half an hour. */
const BUDGETS = [1, 2, 4, 8, 16, 32, 64, -1];
const NUM_SAMPLE = 24;

let server: Server;

before(async () => {
  server = await Server.start();
});

after(async () => {
  assert.equal(await server.stop(), 0);
});

test('a thinking budget is kept, and the answer is never empty', async (t) => {
  const all = fixture('eval.jsonl').filter((line) => line.thinking !== false);
  const stride = Math.floor(all.length / NUM_SAMPLE);
  const lines = all.filter((_, index) => index % stride === 0);
  const shares: number[] = [];
  for (const budget of BUDGETS) {
    let numEnded = 0;
    const right = await pooled(lines, 16, async ({ messages, tools, answer }) => {
      const body = await server.json({ messages, tools, thinking_token_budget: budget, temperature: 0 });
      const [{ message, reasoning_ended: ended, finish_reason: reason }] = body.choices;
      const { reasoning_tokens: numReasoning } = body.usage.completion_tokens_details;
      const shown = JSON.stringify([budget, messages, message, reason]);
      if (budget >= 0) assert.ok(numReasoning <= budget, `${numReasoning} tokens: ${shown}`);
      const text = [message.content, ...(message.tool_calls ?? []).map((call: any) => call.function.arguments)].join(
        '\n',
      );
      assert.ok(text.trim() !== '', shown);
      if (ended === 'budget') numEnded++;
      else assert.ok(ended === undefined || ended === 'loop', shown);
      return text.includes(answer);
    });
    const numRight = right.filter(Boolean).length;
    shares.push(numRight / lines.length);
    t.diagnostic(`budget ${budget}: ${numRight} of ${lines.length} right, ${numEnded} ended by it`);
  }
  assert.ok(shares.at(-1)! > shares[0]!, 'more thinking, better answers');
});

test('min_answer_tokens keeps room for the answer', async () => {
  const messages = [{ role: 'user', content: 'What is 577 × 63?' }];
  const whole = await server.json({ messages, temperature: 0 });
  const numReasoning = whole.usage.completion_tokens_details.reasoning_tokens;
  const limit = { messages, temperature: 0, max_tokens: numReasoning };
  const cut = await server.json(limit);
  assert.deepEqual([cut.choices[0].message.content, cut.choices[0].finish_reason], [null, 'length']);
  const kept = await server.json({ ...limit, min_answer_tokens: 30 });
  assert.ok(kept.choices[0].message.content.length > 0);
  assert.equal(kept.choices[0].reasoning_ended, 'answer_reserve');
  assert.equal(await server.metric('rodin:reasoning_ended_total{reason="answer_reserve"'), 1);
});
