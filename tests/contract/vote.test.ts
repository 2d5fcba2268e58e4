import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setImmediate as turn } from 'node:timers/promises';
import type { Script } from './fake-engine.js';
import { DOCUMENT, QUESTION, startHarness, validatorsOf, type Harness } from './harness.js';

const BODY = { ...QUESTION, n: 5, vote: true, temperature: 1, seed: 7 };
const validate = validatorsOf(DOCUMENT)('ChatCompletion');
const problemsOf = (body: unknown): unknown => (validate(body) ? null : validate.errors);

/** Chain i answers answers[i], one token a turn; null never ends. */
function chains(harness: () => Harness, answers: readonly (string | null)[]): Script {
  return function* (request) {
    const answer = answers[Number(request.sampling.seed) - 7]!;
    for (const token of harness()
      .thought('Hm.', answer ?? 'No')
      .slice(0, -1)) {
      yield { tokens: [token], cachedTokens: 0 };
      yield turn();
    }
    if (answer !== null) yield { tokens: [{ id: 1, phase: 'control' }], finishReason: 'stop', stopTokenId: 1 };
    // Whoever waits for this chain waits for ever.
    else for (;;) yield* [{ tokens: harness().tokens('No', 'answer').slice(0, 1) }, turn()];
  };
}

test('the answer of most comes back, and chains that can change nothing are stopped', async () => {
  const harness: Harness = startHarness({
    script: chains(() => harness, ['It is 4.', null, '2 + 2 = **4**', null, '**4.0**']),
  });
  const { status, body } = await harness.chat(BODY);
  assert.equal(status, 200);
  assert.equal(problemsOf(body), null);
  assert.equal(body.choices.length, 1);
  assert.deepEqual([body.choices[0].index, body.choices[0].message.content], [0, 'It is 4.']);
  assert.deepEqual(body.vote, {
    answer: '4',
    share: 1,
    chain: 0,
    num_chains: 5,
    num_stopped: 2,
    counts: [{ answer: '4', count: 3 }],
  });
  assert.equal(body.seed, 7);
  assert.deepEqual(harness.engine.aborted.map((id) => id.slice(-2)).sort(), ['-1', '-3']);
  const [one] = harness.engine.requests;
  assert.ok(body.usage.completion_tokens > 3 * 5);
  assert.equal(body.usage.prompt_tokens, one!.promptIds.length);
  await harness.close();
});

test('without a majority the lowest chain of the largest group wins; chains that are cut off have no vote', async () => {
  const harness: Harness = startHarness({
    script: chains(() => harness, ['**1**', '**2**', '**3**', '**2**', '**1**']),
  });
  const { body } = await harness.chat(BODY);
  assert.deepEqual([body.vote.answer, body.vote.chain, body.vote.share], ['1', 0, 0.4]);
  assert.deepEqual(body.vote.counts, [
    { answer: '1', count: 2 },
    { answer: '2', count: 2 },
    { answer: '3', count: 1 },
  ]);
  harness.engine.script = function* () {
    yield { tokens: harness.tokens('It is', 'answer'), finishReason: 'length' };
  };
  const { body: cut } = await harness.chat(BODY);
  assert.deepEqual([cut.vote.answer, cut.vote.share, cut.vote.counts], [null, 0, []]);
  assert.equal(cut.choices[0].finish_reason, 'length');
  assert.equal(problemsOf(cut), null);
  await harness.close();
});

test('calls of tools vote by name and arguments', async () => {
  const harness = startHarness();
  const call = (query: string): string =>
    `<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>search<｜tool▁sep｜>${query}<｜tool▁call▁end｜><｜tool▁calls▁end｜>`;
  harness.engine.script = function* ({ sampling }) {
    const text = call(sampling.seed % 2n === 0n ? '{"a": 1, "b": 2}' : '{"b":2,"a":1}');
    const ids = harness.prompts.tokenizer.encodeRendered(text);
    const { toolCallsBegin, toolCallsEnd } = harness.prompts.markers;
    const isEdge = (id: number): boolean => id === toolCallsBegin || id === toolCallsEnd;
    const tokens = ids.map((id) => ({ id, phase: isEdge(id) ? ('control' as const) : ('tool' as const) }));
    yield { tokens, finishReason: 'stop', stopTokenId: 1 };
  };
  const tools = [{ type: 'function', function: { name: 'search', parameters: { type: 'object' } } }];
  const { body } = await harness.chat({ ...BODY, tools });
  assert.equal(body.vote?.answer, 'search {"a":1,"b":2}', JSON.stringify(body));
  assert.equal(body.choices[0].finish_reason, 'tool_calls');
  await harness.close();
});

test('votes that nobody could use are refused', async () => {
  const harness = startHarness();
  for (const [change, param] of [
    [{ stream: true }, 'vote'],
    [{ n: 1 }, 'n'],
    [{ n: undefined }, 'n'],
    [{ temperature: 0 }, 'temperature'],
  ] as const) {
    const { status, body } = await harness.chat({ ...BODY, ...change });
    assert.deepEqual([status, body.error.param], [400, param]);
  }
  assert.equal(harness.engine.requests.length, 0);
  const plain = await harness.chat({ ...BODY, vote: false });
  assert.equal(plain.body.choices.length, 5);
  assert.equal(plain.body.vote, undefined);
  await harness.close();
});
