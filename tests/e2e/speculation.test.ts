import assert from 'node:assert/strict';
import { test } from 'node:test';
import { readEvents, Server } from './server.js';

const REQUEST = {
  messages: [{ role: 'user', content: 'What is 577 × 63?' }],
  temperature: 0.6,
  seed: 7,
  metrics: true,
  return_token_ids: true,
};

test('drafts through HTTP: the same answer, whole and streamed, and numbers that fit together', async () => {
  const plain = await Server.start('--speculative-tokens', '0');
  const drafting = await Server.start('--speculative-tokens', '2');
  try {
    const expected = await plain.json(REQUEST);
    assert.deepEqual(expected.metrics, { speculative: null });
    assert.ok(!('metrics' in (await plain.json({ ...REQUEST, metrics: false, max_tokens: 1 }))));

    const whole = await drafting.json(REQUEST);
    assert.deepEqual(whole.choices[0], expected.choices[0]);
    assert.deepEqual(whole.usage, expected.usage);
    const { draft_tokens: drafted, accepted_tokens: accepted } = whole.metrics.speculative;
    assert.ok(accepted > 0.3 * whole.usage.completion_tokens && accepted <= drafted, `${accepted} of ${drafted}`);

    const { events, isDone } = await readEvents(await drafting.chat({ ...REQUEST, stream: true }));
    assert.ok(isDone);
    const ids = events.flatMap(({ choices }) => choices[0].token_ids);
    assert.deepEqual(ids, expected.choices[0].token_ids);
    assert.ok(events.length < ids.length, 'one event carries all tokens of a step');
    assert.ok(events.every(({ metrics }, index) => (metrics !== undefined) === (index === events.length - 1)));

    const counter = (name: string) => drafting.metric(`vllm:spec_decode_num_${name}`);
    const rounds = await counter('drafts_total');
    assert.ok(rounds > 0 && (await counter('draft_tokens_total')) <= 2 * rounds);
    const perPosition = [
      await counter('accepted_tokens_per_pos_total{position="0"'),
      await counter('accepted_tokens_per_pos_total{position="1"'),
    ];
    assert.equal(perPosition[0]! + perPosition[1]!, await counter('accepted_tokens_total'));
    assert.ok(perPosition[0]! >= perPosition[1]! && perPosition[1]! > 0);
    assert.ok((await counter('accepted_tokens_total')) >= 2 * accepted);
  } finally {
    await plain.stop();
    await drafting.stop();
  }
});
