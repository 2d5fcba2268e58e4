import type { PhaseMarkers } from '../engine/request.js';
import type { TemplateMessage } from './chat-template.js';
import type { Tokenizer } from './tokenizer.js';
import type { ToolMarkers } from './tool-call-parser.js';

/** How a model writes tool calls: R1 and V3 with a fence, V3.1 without, V3.2 as tags, Kimi-K2 with ids of its own. */
export interface ToolFormat {
  name: 'v3' | 'v3.1' | 'v3.2' | 'kimi-k2';
  /** of the whole tool phase */
  phase: Pick<PhaseMarkers, 'toolCallsBegin' | 'toolCallsEnd'>;
  markers: ToolMarkers;
}

const DSML = '｜DSML｜';
const NO_MARKERS: ToolMarkers = { callBegin: -1, callEnd: -1, separator: -1 };

const MARKED = {
  kimi: [
    '<|tool_calls_section_begin|>',
    '<|tool_calls_section_end|>',
    '<|tool_call_begin|>',
    '<|tool_call_end|>',
    '<|tool_call_argument_begin|>',
  ],
  deepseek: [
    '<｜tool▁calls▁begin｜>',
    '<｜tool▁calls▁end｜>',
    '<｜tool▁call▁begin｜>',
    '<｜tool▁call▁end｜>',
    '<｜tool▁sep｜>',
  ],
} as const;

/** The format that vocabulary and template show; null where the vocabulary has no markers for calls. */
export function toolFormatOf(tokenizer: Tokenizer, templateSource: string): ToolFormat | null {
  const dsml = tokenizer.addedId(DSML);
  if (dsml >= 0 && templateSource.includes('DSML')) {
    return { name: 'v3.2', phase: { toolCallsBegin: dsml, toolCallsEnd: -1 }, markers: { ...NO_MARKERS, dsml } };
  }
  const hasFence = templateSource.includes('```json');
  return marked(tokenizer, MARKED.kimi, 'kimi-k2') ?? marked(tokenizer, MARKED.deepseek, hasFence ? 'v3' : 'v3.1');
}

/** Whether the vocabulary is that of V3.2. */
export function hasDsml(tokenizer: Tokenizer): boolean {
  return tokenizer.addedId(DSML) >= 0;
}

function marked(tokenizer: Tokenizer, contents: readonly string[], name: ToolFormat['name']): ToolFormat | null {
  const ids = contents.map((content) => tokenizer.addedId(content));
  if (ids.includes(-1)) return null;
  const [toolCallsBegin, toolCallsEnd, callBegin, callEnd, separator] = ids as [number, number, number, number, number];
  return { name, phase: { toolCallsBegin, toolCallsEnd }, markers: { callBegin, callEnd, separator } };
}

/** One call as the model is to write it; the words in capitals are placeholders. */
const EXAMPLES: Readonly<Record<ToolFormat['name'], string>> = {
  v3:
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n{"PARAMETER": VALUE}\n```' +
    '<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
  'v3.1':
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{"PARAMETER": VALUE}' +
    '<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
  'v3.2':
    '<｜DSML｜function_calls>\n<｜DSML｜invoke name="NAME">\n<｜DSML｜parameter name="PARAMETER" string="true|false">VALUE' +
    '</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
  'kimi-k2':
    '<|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{"PARAMETER": VALUE}' +
    '<|tool_call_end|><|tool_calls_section_end|>',
};

interface FunctionTool {
  function: { name: string; description?: string; parameters?: unknown };
}

/**
 * Messages with the tools described in the system message, for templates that do not show tools. `tools` and messages
 * are broken already where they hold control tokens; the example's are the format's own and stay whole.
 */
export function withToolsPrompt(
  messages: readonly TemplateMessage[],
  tools: readonly unknown[],
  format: ToolFormat,
): TemplateMessage[] {
  const described = (tools as FunctionTool[]).map(({ function: { name, description, parameters } }) => {
    const about = description ? `\nDescription: ${description}` : '';
    return `### ${name}${about}\n\nParameters: ${JSON.stringify(parameters ?? {})}`;
  });
  const text = [
    '## Tools',
    'These functions can be called:',
    ...described,
    `To call one, write exactly this form, with arguments that follow the JSON Schema of its parameters:\n${EXAMPLES[format.name]}`,
    'For several calls repeat the part of one call inside the outer marks. The results come back in the next turn.',
  ].join('\n\n');
  const [first, ...rest] = messages;
  if (first?.role !== 'system') return [{ role: 'system', content: text }, ...messages];
  return [{ ...first, content: first.content ? `${first.content}\n\n${text}` : text }, ...rest];
}
