import assert from 'node:assert/strict';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { ChatTemplate } from '../../server/text/chat-template.js';
import type { OutputDelta } from '../../server/text/output-parser.js';
import { PromptEncoder } from '../../server/text/prompt-encoder.js';
import { Tokenizer } from '../../server/text/tokenizer.js';
import { toolFormatOf } from '../../server/text/tool-format.js';

const POCKET = fileURLToPath(new URL('../../models/pocket-r1', import.meta.url));
const tokenizer = Tokenizer.read(POCKET);
const USER = { role: 'user', content: 'hi' } as const;
const TOOLS = [
  {
    type: 'function',
    function: { name: 'find</think>', description: 'Finds <think>.', parameters: { type: 'object' } },
  },
];

/** A template as R1 has it: no switch, reasoning is opened, tools are not shown. */
const R1 =
  "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}" +
  '{# ```json #}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}';

function encoder(source: string): PromptEncoder {
  return new PromptEncoder(tokenizer, new ChatTemplate(source, { bos_token: '<｜begin▁of▁sentence｜>' }));
}

test('formats are told apart by vocabulary and template', () => {
  assert.equal(toolFormatOf(tokenizer, 'plain')?.name, 'v3.1');
  assert.equal(toolFormatOf(tokenizer, "'\\n```json\\n'")?.name, 'v3');
  const withTokens = (contents: string[]): Tokenizer => {
    const files = structuredClone(tokenizer.files);
    files.tokenizer.added_tokens = contents.map((content, i) => ({
      ...tokenizer.files.tokenizer.added_tokens![0]!,
      id: 1100 + i,
      content,
    }));
    return new Tokenizer(files);
  };
  const kimi = ['section_begin|>', 'section_end|>'].map((end) => `<|tool_calls_${end}`);
  kimi.push('<|tool_call_begin|>', '<|tool_call_end|>', '<|tool_call_argument_begin|>');
  assert.deepEqual(toolFormatOf(withTokens(kimi), ''), {
    name: 'kimi-k2',
    phase: { toolCallsBegin: 1100, toolCallsEnd: 1101 },
    markers: { callBegin: 1102, callEnd: 1103, separator: 1104 },
  });
  assert.equal(toolFormatOf(withTokens(['｜DSML｜']), 'uses DSML')?.phase.toolCallsBegin, 1100);
  assert.equal(toolFormatOf(withTokens(['｜DSML｜']), 'plain'), null);
});

test('templates that show no tools get them in the system message, with real marks and broken words', async () => {
  for (const [source, fence] of [
    [R1, true],
    [R1.replace('{# ```json #}', ''), false],
  ] as const) {
    const prompts = encoder(source);
    assert.equal(prompts.rendersTools, false);
    for (const messages of [[USER], [{ role: 'system' as const, content: 'Be kind.' }, USER]]) {
      const { ids } = await prompts.encode({ messages, tools: TOOLS });
      const text = prompts.textOf(ids);
      assert.equal(text.startsWith('Be kind.\n\n## Tools'), messages.length === 2);
      assert.match(text, /### find<\/think>\nDescription: Finds <think>\.\n\nParameters: \{"type":"object"\}/);
      assert.equal(text.includes('```json'), fence);
      // Of marks there are those of the example, of the user's turn and of the assistant's: none that the tool names.
      assert.deepEqual(
        ids.filter((id) => id < 14),
        [7, 9, 11, 10, 8, 3, 4, 5],
      );
    }
  }
});

test('a model without a switch does not think where its prompt has done so', async () => {
  const prompts = encoder(R1);
  const on = await prompts.encode({ messages: [USER], tools: null });
  const off = await prompts.encode({ messages: [USER], tools: null, thinking: false });
  assert.deepEqual([on.startPhase, off.startPhase], ['reasoning', 'answer']);
  assert.equal(prompts.textOf(off.ids), `${prompts.textOf(on.ids)}\n</think>\n\n`);
  const silent = encoder(R1.replace('<think>\n', ''));
  const none = await silent.encode({ messages: [USER], tools: null, thinking: false });
  assert.match(silent.textOf(none.ids), /<｜Assistant｜><think>\n\n<\/think>\n\n$/);
});

test('R1-Zero: its template, and tags in the text', async () => {
  const prompts = PromptEncoder.read(POCKET, 'r1-zero');
  const { ids, startPhase } = await prompts.encode({
    messages: [{ role: 'user', content: 'What is 2 + 2?' }],
    tools: null,
  });
  const text = prompts.textOf(ids);
  assert.match(
    text,
    /^<｜begin▁of▁sentence｜>A conversation between User and Assistant\. .* <\/answer>\. User: What is 2 \+ 2\?\. Assistant:$/s,
  );
  assert.equal(startPhase, 'answer');
  assert.equal(prompts.markers.thinkEnd, -1);
  const parser = prompts.parser([], 'answer');
  const tokens = [5, ...tokenizer.encodeText(' so '), 6, ...tokenizer.encodeText(' <answer> 4 </answer> User: more')];
  const deltas: OutputDelta[] = [];
  for (const id of tokens) {
    deltas.push(...parser.push({ id, phase: 'answer' }));
    if (parser.matchedStop !== null) break;
  }
  const of = (kind: string): string =>
    deltas.map((delta) => (delta.kind === kind && 'text' in delta ? delta.text : '')).join('');
  assert.deepEqual([of('reasoning'), of('content'), parser.matchedStop], ['so', '4', '</answer>']);
  await prompts.close();
});

test('V3.2, which has no template: thinking, calls and results as tags, and what users type stays text', async () => {
  const files = structuredClone(tokenizer.files);
  files.tokenizer.added_tokens!.push({ ...files.tokenizer.added_tokens![0]!, id: 1100, content: '｜DSML｜' });
  delete files.config['chat_template'];
  const own = new Tokenizer(files);
  const config = { bos_token: '<｜begin▁of▁sentence｜>', eos_token: '<｜end▁of▁sentence｜>' };
  const prompts = new PromptEncoder(own, ChatTemplate.read('/nowhere', config, true));
  assert.throws(() => ChatTemplate.read('/nowhere', config, false), /no chat template/);
  assert.deepEqual([prompts.toolFormat?.name, prompts.hasThinkingSwitch, prompts.rendersTools], ['v3.2', true, false]);
  const call = (id: string, name: string, args: string) => ({
    id,
    type: 'function' as const,
    function: { name, arguments: args },
  });
  const history = [
    { role: 'system' as const, content: 'Be kind.' },
    { role: 'user' as const, content: 'one' },
    { role: 'assistant' as const, content: 'first', reasoning_content: 'gone' },
    { role: 'user' as const, content: 'two <｜DSML｜invoke' },
    {
      role: 'assistant' as const,
      content: '',
      reasoning_content: 'kept',
      tool_calls: [call('a', 'f', '{"q": "x \\"y\\"", "n": [1, {"k": true}]}'), call('b', 'g', '{}')],
    },
    { role: 'tool' as const, content: 'R1', tool_call_id: 'a' },
    { role: 'tool' as const, content: 'R2', tool_call_id: 'b' },
  ];
  const D = '｜DSML｜';
  const calls =
    `\n\n<${D}function_calls>\n<${D}invoke name="f">\n<${D}parameter name="q" string="true">x "y"</${D}parameter>\n` +
    `<${D}parameter name="n" string="false">[1, {"k": true}]</${D}parameter>\n</${D}invoke>\n` +
    `<${D}invoke name="g">\n</${D}invoke>\n</${D}function_calls><｜end▁of▁sentence｜>`;
  const results = '\n\n<function_results>\n<result>R1</result>\n<result>R2</result>\n</function_results>\n\n';
  const head =
    '<｜begin▁of▁sentence｜>Be kind.<｜User｜>one<｜Assistant｜></think>first<｜end▁of▁sentence｜><｜User｜>two <｜DSML｜invoke<｜Assistant｜>';
  for (const [thinking, expected] of [
    [true, `${head}<think>kept</think>${calls}${results}<think>`],
    [false, `${head}</think>${calls}${results}</think>`],
  ] as const) {
    const { ids, startPhase } = await prompts.encode({ messages: history, tools: null, thinking });
    assert.equal(prompts.textOf(ids), expected);
    assert.equal(startPhase, thinking ? 'reasoning' : 'answer');
    // One mark for each tag of a call, none for the one that the user has typed.
    assert.equal(ids.filter((id) => id === 1100).length, 10);
  }
  const withTools = await prompts.encode({ messages: [USER], tools: TOOLS });
  assert.match(
    prompts.textOf(withTools.ids),
    /^<｜begin▁of▁sentence｜>## Tools[^]*<｜DSML｜invoke name="NAME">[^]*<｜User｜>hi/,
  );
  const broken = [...history.slice(0, 4), { ...history[4]!, tool_calls: [call('a', 'f', '[1]')] }];
  await assert.rejects(prompts.encode({ messages: broken, tools: null }), /must be a JSON object/);
  await prompts.close();
});
