import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { PromptEncoder } from '../../server/text/prompt-encoder.js';
import { fixture, pooled, Server } from './server.js';

/** All of them: RODIN_TEST_TRANSCRIPTS=1000. */
const NUM_TRANSCRIPTS = Number(process.env['RODIN_TEST_TRANSCRIPTS'] ?? 24);
const NUM_TURNS = 4;
const BLOCK_SIZE = 16;
// A fixed number of drafts: with auto, one sequence in 64 may compute a prefix again for the sake of its drafts.
const server = await Server.start('--block-size', String(BLOCK_SIZE), '--speculative-tokens', '1');
const prompts = PromptEncoder.read(fileURLToPath(new URL('../../models/pocket-r1', import.meta.url)));
after(async () => {
  assert.equal(await server.stop(), 0);
  await prompts.close();
});

const questions: string[] = fixture('eval.jsonl').flatMap(({ messages }) =>
  messages.filter(({ role }: any) => role === 'user').map(({ content }: any) => content),
);
const { thinkStart, toolCallsBegin } = prompts.markers;
const { tools } = fixture('greedy.jsonl').find((line) => line.tools);

/** Most tokens of an answer: temperature 2 makes texts that are no words, in tokens that no tokenizer would take. */
const MAX_TOKENS = 60;

interface Tally {
  turns: number;
  toolTurns: number;
  /** answers whose text, tokenized, is not what was sampled */
  otherwise: number;
  missed: string[];
}

/** What the prefix cache must hold of a turn that has ended: all but the last token were computed. */
function fullBlocks(usage: any): number {
  return Math.floor((usage.prompt_tokens + usage.completion_tokens - 1) / BLOCK_SIZE) * BLOCK_SIZE;
}

async function converse(index: number, tally: Tally): Promise<void> {
  const messages: any[] = [{ role: 'system', content: `Conversation ${index}.` }];
  const hasTools = index % 3 === 0;
  let expected = 0;
  for (let turn = 0; turn < NUM_TURNS; turn++) {
    const question = questions[(7 * index + 31 * turn) % questions.length]!;
    if (messages.at(-1).role !== 'tool') messages.push({ role: 'user', content: question.slice(0, 300) });
    const isCall = hasTools && messages.at(-1).role === 'user';
    const { choices, usage } = await server.json({
      messages,
      ...(hasTools ? { tools } : {}),
      // Reasoning stays in the prompt only behind calls; other turns answer at once, so that all of them stays.
      ...(isCall
        ? { tool_choice: 'required', max_tokens: 400, temperature: 1, top_p: 1 }
        : { temperature: 2, top_p: 1 }),
      ...(isCall ? {} : { thinking: { type: 'disabled' }, max_tokens: MAX_TOKENS }),
      seed: 1000 * index + turn,
      return_token_ids: true,
      // An answer that thinks again, or opens a call and breaks it off, is not shown to the model as it was.
      logit_bias: { [thinkStart]: -100, ...(isCall ? {} : { [toolCallsBegin]: -100 }) },
    });
    const cached = usage.prompt_tokens_details.cached_tokens;
    const [{ message, token_ids: ids }] = choices;
    // The template shows no reasoning of before the last question.
    const isNewQuestion = messages.at(-1).role === 'user';
    if (!hasTools || !isNewQuestion) {
      if (turn > 0) tally.turns++;
      if (cached < expected) tally.missed.push(`${index}.${turn}: ${cached} of ${expected}`);
    }
    const said = ids.filter((id: number) => !prompts.tokenizer.isSpecial(id));
    const text = (message.reasoning_content ?? '') + (message.content ?? '');
    tally.otherwise += Number(
      message.tool_calls === undefined && said.join() !== prompts.tokenizer.encodeText(text).join(),
    );
    // As text, and without the reasoning.
    const { content, tool_calls: calls } = message;
    messages.push({ role: 'assistant', content, ...(calls ? { tool_calls: calls } : {}) });
    for (const { id } of calls ?? []) messages.push({ role: 'tool', tool_call_id: id, content: `{"result": ${turn}}` });
    tally.toolTurns += Number(calls !== undefined && message.reasoning_content !== undefined);
    // An answer without its end is given one by the template, behind all that was sampled.
    expected = fullBlocks(usage);
  }
}

test(`${NUM_TRANSCRIPTS} conversations that come back as text hit the prefix cache in every full block`, async (context) => {
  const tally: Tally = { turns: 0, toolTurns: 0, otherwise: 0, missed: [] };
  await pooled([...Array(NUM_TRANSCRIPTS).keys()], 4, (index) => converse(index, tally));
  const { turns, toolTurns, otherwise, missed } = tally;
  context.diagnostic(
    `${turns} turns, ${toolTurns} with calls behind reasoning; ${otherwise} answers sampled otherwise`,
  );
  assert.deepEqual(missed, []);
  assert.ok(turns > 2 * NUM_TRANSCRIPTS);
  assert.ok(otherwise > NUM_TRANSCRIPTS / 6 && toolTurns > NUM_TRANSCRIPTS / 6, `${otherwise} ${toolTurns}`);
});
