import { ApiError } from '../errors.js';
import { choice, DIGIT, GrammarBuilder, MAX_CODE_POINT, repeat, sequence, type Grammar, type GrammarNode } from '../grammar/grammar.js'; // prettier-ignore
import { JsonRules } from '../grammar/json.js';
import type { PromptEncoder } from '../text/prompt-encoder.js';
import type { ChatBody } from './chat-request.js';
import type { OutputFormat, OutputFormats } from './output-format.js';

type Tool = NonNullable<NonNullable<ChatBody['tools']>[number]>;
type Json = Record<string, unknown>;

/** What a request says about calls. */
interface CallRule {
  /** tools that may be called */
  tools: { tool: Tool; index: number }[];
  isRequired: boolean;
  max: number | null;
  /** whether a grammar is needed to keep to it */
  isConstrained: boolean;
}

/**
 * The grammar of the whole answer: the calls that tool_choice, strict tools and parallel_tool_calls leave, beside the
 * format that was asked for. null: everything is free.
 */
export function answerFormat(
  body: ChatBody,
  format: OutputFormat | null,
  formats: OutputFormats,
  prompts: PromptEncoder,
): OutputFormat | null {
  const rule = readCallRule(body);
  if (rule === null || (!rule.isConstrained && format === null)) return format;
  const builder = new GrammarBuilder();
  const calls = callsNode(rule, builder, formats, prompts);
  const param = rule.isRequired ? 'tool_choice' : (format?.param ?? 'tools');
  if (rule.isRequired) return { param, grammar: builder.build(calls) };
  if (format) return { param, grammar: builder.build(choice(embed(format.grammar, builder), calls)) };
  const prose = repeat({ kind: 'class', ranges: [[0, MAX_CODE_POINT]] }, 0, null);
  return { param, grammar: builder.build(sequence(prose, repeat(calls, 0, 1))) };
}

/** null: no calls are possible. */
function readCallRule(body: ChatBody): CallRule | null {
  const wanted = body.tool_choice;
  const all = (body.tools ?? []).map((tool, index) => ({ tool, index }));
  if (wanted === 'none') return null;
  if (all.length === 0) {
    if (wanted === undefined || wanted === null || wanted === 'auto') return null;
    throw new ApiError('invalid_value', "'tool_choice' asks for a call, but there are no 'tools'.", 'tool_choice');
  }
  const max = body.parallel_tool_calls === false ? 1 : null;
  const named = (names: (string | undefined)[]) => {
    const tools = all.filter(({ tool }) => names.includes(tool.function.name));
    const unknown = names.find((name) => !tools.some(({ tool }) => tool.function.name === name));
    if (tools.length > 0 && unknown === undefined && !names.includes(undefined)) return tools;
    const message = `'tool_choice' must name functions of 'tools'; ${JSON.stringify(unknown ?? null)} is none of them.`;
    throw new ApiError('invalid_value', message, 'tool_choice');
  };
  const isStrict = all.some(({ tool }) => (tool.function as Json)['strict'] === true);
  if (wanted === undefined || wanted === null || wanted === 'auto') {
    return { tools: all, isRequired: false, max, isConstrained: isStrict };
  }
  if (wanted === 'required') return { tools: all, isRequired: true, max, isConstrained: true };
  if (typeof wanted === 'object' && wanted['type'] === 'function') {
    const name = (wanted['function'] as Json | undefined)?.['name'] as string | undefined;
    return { tools: named([name]), isRequired: true, max: 1, isConstrained: true };
  }
  if (typeof wanted === 'object' && wanted['type'] === 'allowed_tools') {
    const allowed = (wanted['allowed_tools'] ?? {}) as { mode?: string; tools?: { function?: { name?: string } }[] };
    const tools = named((Array.isArray(allowed.tools) ? allowed.tools : []).map((tool) => tool?.function?.name));
    return { tools, isRequired: allowed.mode === 'required', max, isConstrained: true };
  }
  const message = "'tool_choice' must be auto, none, required, a function by name, or allowed_tools.";
  throw new ApiError('invalid_value', message, 'tool_choice');
}

/** V3 and R1 write the arguments in a fence, V3.1 as they are, Kimi-K2 a name with a number before them. */
function callsNode(
  rule: CallRule,
  builder: GrammarBuilder,
  formats: OutputFormats,
  prompts: PromptEncoder,
): GrammarNode {
  const { toolCallsBegin, toolCallsEnd } = prompts.markers;
  const { callBegin, callEnd, separator } = prompts.toolMarkers;
  const form = prompts.toolFormat?.name;
  if (form === undefined || form === 'v3.2') {
    const message = "This model's form of tool calls cannot be held to; leave 'tool_choice' and 'strict' out.";
    throw new ApiError('unsupported_value', message, 'tool_choice');
  }
  const control = (tokenId: number): GrammarNode => ({ kind: 'control', tokenId });
  const calls = rule.tools.map(({ tool, index }) => {
    const name = tool.function.name;
    const args = argumentsNode(tool, index, builder, formats);
    const inner = {
      v3: () => sequence('function', control(separator), `${name}\n\`\`\`json\n`, args, '\n```'),
      'v3.1': () => sequence(name, control(separator), args),
      'kimi-k2': () => sequence(`functions.${name}:`, repeat(DIGIT, 1, 2), control(separator), args),
    }[form]();
    return sequence(control(callBegin), inner, control(callEnd));
  });
  const call = builder.rule(choice(...calls));
  return sequence(control(toolCallsBegin), repeat(call, 1, rule.max), control(toolCallsEnd));
}

/** A strict tool's schema must be followed; of another it is where that is possible. */
function argumentsNode(tool: Tool, index: number, builder: GrammarBuilder, formats: OutputFormats): GrammarNode {
  const { parameters, strict } = tool.function as { parameters?: Json | null; strict?: boolean | null };
  if (parameters === undefined || parameters === null) return new JsonRules(builder).object;
  try {
    return embed(formats.schema({ type: 'object', ...parameters }, `tools[${index}].function.parameters`), builder);
  } catch (error) {
    if (strict === true || !(error instanceof ApiError)) throw error;
    return new JsonRules(builder).object;
  }
}

/** A grammar's rules as rules of another. */
function embed({ rules }: Grammar, builder: GrammarBuilder): GrammarNode {
  const references = rules.map(() => builder.declare());
  const moved = (node: GrammarNode): GrammarNode => {
    switch (node.kind) {
      case 'rule':
        return references[node.index]!;
      case 'sequence':
      case 'choice':
        return { kind: node.kind, items: node.items.map(moved) };
      case 'repeat':
        return { ...node, item: moved(node.item) };
      case 'text':
      case 'class':
      case 'control':
        return node;
    }
  };
  for (const [index, node] of rules.entries()) builder.define(references[index]!, moved(node));
  return references[0]!;
}
