import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { oneByOne } from './fake-engine.js';
import { QUESTION, startHarness, type Harness } from './harness.js';

async function prewarmsOf(harness: Harness, body: object): Promise<Harness['engine']['prewarms']> {
  harness.engine.prewarms.length = 0;
  assert.equal((await harness.chat(body)).status, 200);
  await sleep(20); // the prompt is made behind the response
  return harness.engine.prewarms;
}

test('an answer behind reasoning is prewarmed as the next turn shows it, with the tokens that it was sampled as', async () => {
  const harness = startHarness({ args: ['--prewarm'] });
  const { prompts, engine } = harness;
  const [prewarm, ...others] = await prewarmsOf(harness, { ...QUESTION, cache_salt: 'own' });
  assert.deepEqual(others, []);
  const { promptIds, cacheSalt } = engine.requests.at(-1)!;
  assert.equal(prewarm!.cacheSalt, cacheSalt);
  const sampled = harness.thought('Let me see.', 'It is 4.').map(({ id }) => id);
  assert.deepEqual(prewarm!.supersededIds, [...promptIds, ...sampled]);
  const messages = [
    ...QUESTION.messages,
    { role: 'assistant', content: 'It is 4.' },
    { role: 'user', content: 'Why?' },
  ];
  await harness.chat({ ...QUESTION, messages, cache_salt: 'own' });
  const next = engine.requests.at(-1)!.promptIds;
  assert.deepEqual(next.slice(0, prewarm!.promptIds.length), prewarm!.promptIds);
  // All but the question and the opening of the answer.
  assert.match(prompts.textOf(next.slice(prewarm!.promptIds.length)), /^Why\?<｜Assistant｜><think>$/);
  await harness.close();
});

test('what stays in the prompt as it was sampled, choices, and calls are not prewarmed; nothing is without the flag', async () => {
  const harness = startHarness({ args: ['--prewarm'] });
  assert.deepEqual(await prewarmsOf(harness, { ...QUESTION, n: 2 }), []);
  harness.engine.script = oneByOne(harness.tokens('It is 4.', 'answer').concat({ id: 1, phase: 'control' }));
  assert.deepEqual(await prewarmsOf(harness, { ...QUESTION, thinking: { type: 'disabled' } }), []);
  const { toolCallsBegin, toolCallsEnd, thinkEnd } = harness.prompts.markers;
  const call = harness.prompts.tokenizer.encodeRendered(
    '<｜tool▁call▁begin｜>search<｜tool▁sep｜>{}<｜tool▁call▁end｜>',
  );
  harness.engine.script = oneByOne([
    ...harness.tokens('Search.', 'reasoning'),
    ...[thinkEnd, toolCallsBegin].map((id) => ({ id, phase: 'control' as const })),
    ...call.map((id) => ({ id, phase: 'tool' as const })),
    ...[toolCallsEnd, 1].map((id) => ({ id, phase: 'control' as const })),
  ]);
  const tools = [{ type: 'function', function: { name: 'search', parameters: { type: 'object' } } }];
  assert.deepEqual(await prewarmsOf(harness, { ...QUESTION, tools }), []);
  await harness.close();
  const off = startHarness();
  assert.deepEqual(await prewarmsOf(off, QUESTION), []);
  await off.close();
});
