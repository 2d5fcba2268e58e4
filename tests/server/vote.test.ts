import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { Vote } from '../../server/api/vote.js';
import { finalAnswer } from '../../server/text/final-answer.js';

test('what an answer comes down to', () => {
  for (const [content, expected] of [
    ['So we get \\boxed{\\frac{1}{2}}, not \\boxed{ 3 }.', '3'],
    ['So \\boxed{\\frac{1}{2}}', '\\frac{1}{2}'],
    ['**7**\nbut <answer> Paris. </answer>', 'paris'],
    ['{"b": 1, "a": [2, {"d": 1, "c": 2}]}', '{"a":[2,{"c":2,"d":1}],"b":1}'],
    ['```json\n{"answer": 77119}\n```', '{"answer":77119}'],
    ['577 * 63 = **36,351**', '36351'],
    ['It is **Wednesday**.', 'wednesday'],
    ['**22, 35, 41**', '22, 35, 41'],
    ['Step 1.\n577 × 63 = 36351.\n\n', '36351'],
    ['The answer is 3.50', '3.5'],
    ['Final answer: $12,000.00$', '12000'],
    ['There are 3 of them.', '3'],
    ['1 of 2 of them', '1 of 2 of them'],
    ['  You are\twelcome! ', 'you are welcome'],
    ['12345678901234567890', '12345678901234567890'],
    ['  \n ', null],
    ['\\boxed{}', null],
    ['\\boxed{unclosed', '\\boxed{unclosed'],
  ] as const) {
    assert.equal(finalAnswer(content), expected, content);
  }
});

test('finalAnswer of any text is a text that it leaves as it is, or null', () => {
  fc.assert(
    fc.property(fc.string(), (text) => {
      const answer = finalAnswer(text);
      assert.ok(answer === null || answer.trim() !== '');
    }),
  );
});

test('a vote is decided only when no end of the chains that run could change the winner', () => {
  const answers = fc.array(fc.constantFrom('a', 'b', 'c', null), { minLength: 2, maxLength: 8 });
  let numEarly = 0;
  fc.assert(
    fc.property(
      answers.chain((list) =>
        fc.tuple(fc.constant(list), fc.shuffledSubarray([...list.keys()], { minLength: list.length })),
      ),
      ([list, order]) => {
        const vote = new Vote(list.length);
        let decided: string | null = null;
        for (const chain of order) {
          vote.add(chain, list[chain]!);
          if (vote.isDecided && decided === null) {
            decided = vote.counts[0]!.answer;
            numEarly += Number(vote.numEnded < list.length);
          }
        }
        const counts = vote.counts;
        if (decided !== null) assert.equal(counts[0]!.answer, decided);
        const numVotes = counts.reduce((sum, { chains }) => sum + chains.length, 0);
        assert.equal(numVotes, list.filter((answer) => answer !== null).length);
        assert.ok(counts.every(({ chains }, at) => at === 0 || chains.length <= counts[at - 1]!.chains.length));
      },
    ),
    { numRuns: 500 },
  );
  assert.ok(numEarly > 50, `${numEarly}`);
});

test('three of five decide; two against one do not; of equal numbers the lowest chain wins', () => {
  const vote = new Vote(5);
  for (const chain of [0, 1]) vote.add(chain, 'x');
  vote.add(2, 'y');
  assert.equal(vote.isDecided, false);
  vote.add(3, 'x');
  assert.equal(vote.isDecided, true);
  const even = new Vote(4);
  for (const [chain, answer] of [[3, 'b'], [1, 'b'], [2, 'a'], [0, 'a']] as const) even.add(chain, answer); // prettier-ignore
  assert.equal(even.isDecided, false);
  assert.deepEqual(even.counts[0], { answer: 'a', chains: [0, 2] });
});
