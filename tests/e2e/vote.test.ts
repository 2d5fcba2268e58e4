import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { after, test } from 'node:test';
import { fixture, pooled, Server } from './server.js';

const README = readFileSync(new URL('../../README.md', import.meta.url), 'utf8');
const NUM_QUESTIONS = 12;
const server = await Server.start();
after(async () => {
  assert.equal(await server.stop(), 0);
});

test('chains that share a prefill vote: their answer is the one that the same chains give alone', async () => {
  const questions = fixture('eval.jsonl').filter(({ task }) => task === 'subway' || task === 'days');
  let numSaved = 0;
  let numShared = 0;
  await pooled(questions.slice(0, NUM_QUESTIONS), 2, async ({ messages, answer }) => {
    const seed = Number(answer.length) + 40;
    const body = { messages, temperature: 1, n: 5, seed };
    const before = await server.json(body);
    const voted = await server.json({ ...body, vote: true });
    const [choice] = voted.choices;
    assert.deepEqual(choice.message, before.choices[voted.vote.chain].message);
    assert.equal(voted.usage.prompt_tokens, before.usage.prompt_tokens);
    numSaved += before.usage.completion_tokens - voted.usage.completion_tokens;
    numShared += voted.usage.prompt_tokens_details.cached_tokens;
    const numVoted = voted.vote.counts.reduce((sum: number, { count }: { count: number }) => sum + count, 0);
    assert.equal(numVoted + voted.vote.num_stopped, 5);
    assert.equal(voted.vote.share, voted.vote.counts[0].count / numVoted);
    // What wins has the most of what the same chains answered alone.
    assert.ok(voted.vote.counts.every(({ count }: { count: number }) => count <= voted.vote.counts[0].count));
  });
  assert.ok(numSaved > 0 && numShared > 0, `${numSaved} ${numShared}`);
});

test("README's vote comes out as README says", async () => {
  const body = /-d '(\{"model": "pocket-r1", "n": 5, .*\})'/.exec(README)?.[1];
  const { choices, vote } = await server.json(JSON.parse(body!));
  assert.equal(choices.length, 1);
  assert.match(choices[0].message.content, new RegExp(vote.answer));
  assert.ok(vote.share > 0 && vote.num_chains === 5);
});
