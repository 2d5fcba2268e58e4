import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import fc from 'fast-check';
import { AnswerMemory } from '../../server/api/answer-memory.js';
import { GREEDY, type EngineRequest } from '../../server/engine/request.js';
import type { TemplateInput, TemplateMessage } from '../../server/text/chat-template.js';
import { PromptEncoder } from '../../server/text/prompt-encoder.js';

const prompts = PromptEncoder.read(fileURLToPath(new URL('../../models/pocket-r1', import.meta.url)));
after(() => prompts.close());
const { tokenizer, markers } = prompts;
const EOS = 1;

/** A text as single characters: tokens that no tokenizer would take. */
function spelled(text: string): number[] {
  return [...text].flatMap((character) => tokenizer.encodeText(character));
}

function requestOf(promptIds: number[], startPhase: 'reasoning' | 'answer'): EngineRequest {
  const sampling = { ...GREEDY, stopTokenIds: [EOS], maxTokens: 100 };
  return { requestId: 'r', promptIds, sampling, markers, startPhase, cacheSalt: '' };
}

async function encode(memory: AnswerMemory, messages: TemplateMessage[], rest: Partial<TemplateInput> = {}, salt = '') {
  const { key, ...recalled } = memory.recall(messages, salt);
  return { key, ...(await prompts.encode({ tools: null, ...recalled, ...rest })) };
}

const QUESTION: TemplateMessage = { role: 'user', content: 'What is 2 + 2?' };

test('an answer that comes back as text has the tokens that it was sampled as, and the prompt the same text', async () => {
  const memory = new AnswerMemory();
  const words = fc.array(fc.constantFrom('answer', ' is ', '36351', '\n', '**', 'é', '水', '<think>', '\ufdd0', '.'), {
    minLength: 1,
  });
  let numOtherwise = 0;
  await fc.assert(
    fc.asyncProperty(words, async (parts) => {
      const text = parts.join('');
      const messages = [QUESTION];
      const { key, ids: promptIds } = await encode(memory, messages, { thinking: false });
      const sampled = spelled(text);
      memory.add(key, requestOf(promptIds, 'answer'), [...sampled, EOS], [], prompts);
      const back = [...messages, { role: 'assistant' as const, content: text }, QUESTION];
      const { ids } = await encode(memory, back, { thinking: false });
      assert.deepEqual(ids.slice(0, promptIds.length + sampled.length + 1), [...promptIds, ...sampled, EOS]);
      const canonical = await prompts.encode({ messages: back, tools: null, thinking: false });
      assert.equal(prompts.textOf(ids), prompts.textOf(canonical.ids));
      numOtherwise += Number(ids.join() !== canonical.ids.join());
      // Elsewhere it is a text like any other.
      for (const [other, salt] of [
        [back, 'tenant'],
        [[{ ...QUESTION, content: 'Hm?' }, ...back.slice(1)], ''],
      ] as const) {
        const found = await encode(memory, [...other], { thinking: false }, salt);
        assert.deepEqual(found.ids, (await prompts.encode({ messages: [...other], tools: null, thinking: false })).ids);
      }
    }),
    { numRuns: 60 },
  );
  assert.ok(numOtherwise > 20, `${numOtherwise}`);
});

const { toolMarkers } = prompts;

/** A call behind reasoning, as the model samples it. */
function sampledCall(reasoning: string, args: string): number[] {
  const { toolCallsBegin, toolCallsEnd, thinkEnd } = markers;
  const { callBegin, callEnd, separator } = toolMarkers;
  const call = [callBegin, ...spelled('search'), separator, ...spelled(args), callEnd];
  return [...spelled(reasoning), thinkEnd, toolCallsBegin, ...call, toolCallsEnd, EOS];
}

test('a call gets back the reasoning that the client has dropped, by its id; and its arguments in whatever spacing', async () => {
  const memory = new AnswerMemory();
  const callId = 'call_0123456789abcdef01234567';
  const { key, ids: promptIds } = await encode(memory, [QUESTION], { thinking: true });
  const sampled = sampledCall('Search it.', '{"query": "violin"}');
  memory.add(key, requestOf(promptIds, 'reasoning'), sampled, [callId], prompts);
  const back = (args: string, id = callId, name = 'search', question = QUESTION): TemplateMessage[] => [
    question,
    { role: 'assistant', content: null, tool_calls: [{ id, type: 'function', function: { name, arguments: args } }] },
    { role: 'tool', content: '{}', tool_call_id: id },
  ];
  for (const args of ['{"query": "violin"}', '{"query":"violin"}']) {
    for (const id of [callId, callId.replace('call', 'toolu')]) {
      const { ids } = await encode(memory, back(args, id));
      assert.deepEqual(ids.slice(0, promptIds.length + sampled.length), [...promptIds, ...sampled]);
    }
  }
  // Another question before it makes no other call of it.
  const moved = await encode(
    memory,
    back('{"query": "violin"}', callId, 'search', { ...QUESTION, content: 'Find it.' }),
  );
  assert.match(prompts.textOf(moved.ids), /<think>Search it\.<\/think>/);
  // What the client has changed stays changed.
  const changed = await encode(memory, back('{"query": "viola"}'));
  assert.match(prompts.textOf(changed.ids), /viola"/);
  const own = back('{"query": "violin"}').map((message) =>
    message.role === 'assistant' ? { ...message, reasoning_content: 'My own.' } : message,
  );
  assert.match(prompts.textOf((await encode(memory, own)).ids), /<think>My own\.<\/think>/);
  // A call of another tenant, or one that nobody made, is a text like any other.
  for (const [messages, salt] of [
    [back('{"query": "violin"}'), 'tenant'],
    [back('{}', 'call_0'), ''],
  ] as const) {
    const { ids } = await encode(memory, messages, {}, salt);
    assert.deepEqual(ids, (await prompts.encode({ messages, tools: null })).ids);
  }
});

test('names that a model gives to its calls are the same in every conversation: reasoning stays in its own', async () => {
  const memory = new AnswerMemory();
  const callId = 'functions.search:0';
  const { key, ids: promptIds } = await encode(memory, [QUESTION]);
  memory.add(key, requestOf(promptIds, 'reasoning'), sampledCall('A secret.', '{}'), [callId], prompts);
  const call = { id: callId, type: 'function' as const, function: { name: 'search', arguments: '{}' } };
  const turn: TemplateMessage[] = [
    { role: 'assistant', content: null, tool_calls: [call] },
    { role: 'tool', content: '{}', tool_call_id: callId },
  ];
  assert.match(prompts.textOf((await encode(memory, [QUESTION, ...turn])).ids), /A secret/);
  const other = { ...QUESTION, content: 'Something else' };
  assert.doesNotMatch(prompts.textOf((await encode(memory, [other, ...turn])).ids), /A secret/);
});
