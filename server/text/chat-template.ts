import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { Template } from '@huggingface/jinja';
import { ApiError, StartupError } from '../errors.js';
import { DSML_TEMPLATE } from './dsml-template.js';
import type { SampledText } from './sampled-text.js';

/** A message as templates know it: content joined to one string, snake_case as in every published template. */
export interface TemplateMessage {
  role: 'system' | 'user' | 'assistant' | 'tool';
  content: string | null;
  reasoning_content?: string;
  name?: string;
  tool_call_id?: string;
  tool_calls?: TemplateToolCall[];
}

export interface TemplateToolCall {
  id: string;
  type: 'function';
  /** JSON text; an object where the template wants that */
  function: { name: string; arguments: string | Record<string, unknown> };
}

export interface TemplateInput {
  messages: TemplateMessage[];
  tools: unknown[] | null;
  /** undefined leaves it to the template */
  thinking?: boolean;
  /** what the completion begins with, after the template's text */
  prefix?: TurnPrefix;
  /** texts of assistants' turns that are put into the prompt as the tokens that they were sampled as */
  sampled?: readonly SampledText[]; // [num_texts]
  /** the conversation as it is, without the opening of the assistant's turn */
  noGenerationPrompt?: boolean;
}

/** The beginning of an assistant's turn that the model goes on with. */
export interface TurnPrefix {
  reasoning: string | null;
  /** '' where the reasoning itself goes on */
  content: string;
}

/** The instruction that R1-Zero was trained on (arXiv 2501.12948, table 1): other words are another model. */
const R1_ZERO = `{{- bos_token or '' -}}
A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>.
{%- for m in messages %}
{%- if m.role == 'assistant' %} Assistant: <answer> {{ m.content or '' }} </answer>
{%- elif m.role == 'tool' %} User: {{ m.content }}
{%- elif m.role == 'system' %} {{ m.content }}
{%- else %} User: {{ m.content }}{% if not loop.last %}.{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}. Assistant:{% endif %}`;

/** Rendered text longer than this is refused: no context holds it. */
const MAX_RENDERED_CHARACTERS = 64 * 1024 * 1024;

/** The checkpoint's own Jinja template. A request never brings one: templates have no step limit. */
export class ChatTemplate {
  readonly source: string;
  readonly specialTokens: Record<string, string>;
  readonly #template: Template;
  /** what the template itself cuts from an assistant's content: up to the first or the last `</think>` */
  readonly #cutsReasoning: 'first' | 'last' | null;

  /** whether the template looks at `thinking` or `enable_thinking` */
  readonly hasThinkingSwitch: boolean;
  /** whether the template looks at `tools` */
  readonly rendersTools: boolean;
  /** whether it walks the arguments of calls, which are JSON text elsewhere */
  readonly wantsObjects: boolean;

  constructor(source: string, specialTokens: Record<string, string>) {
    this.#template = new Template(source);
    this.source = source;
    this.specialTokens = specialTokens;
    this.rendersTools = /\btools\b/.test(source);
    this.wantsObjects = source === DSML_TEMPLATE;
    this.hasThinkingSwitch = /\b(enable_)?thinking\b/.test(source);
    const split = /\.split\(\s*(['"])<\/think>\1\s*(,\s*1\s*)?\)/.exec(source);
    this.#cutsReasoning = split ? (split[2] ? 'first' : 'last') : null;
  }

  /** R1-Zero's template: plain text around the question. Earlier turns are put before it in the same words. */
  static r1Zero(config: Record<string, unknown>): ChatTemplate {
    return new ChatTemplate(R1_ZERO, specialTokensOf(config));
  }

  /** chat_template.jinja wins over tokenizer_config.json, as in Transformers; V3.2 has neither, and a form of its own. */
  static read(folder: string, config: Record<string, unknown>, isDsml = false): ChatTemplate {
    const path = join(folder, 'chat_template.jinja');
    const written = existsSync(path) ? readFileSync(path, 'utf8') : sourceOf(config.chat_template);
    const source = written ?? (isDsml ? DSML_TEMPLATE : null);
    if (source === null) {
      throw new StartupError(
        `${folder} has no chat template (chat_template in tokenizer_config.json, or chat_template.jinja); ` +
          `copy one from the model's page into the folder.`,
      );
    }
    try {
      return new ChatTemplate(source, specialTokensOf(config));
    } catch (error) {
      if (error instanceof StartupError) throw error;
      throw new StartupError(`${folder}: the chat template cannot be parsed: ${(error as Error).message}`);
    }
  }

  /**
   * Text of an assistant's turn without the reasoning that the template would cut. It is cut here because the
   * template sees `</think>` only in broken form.
   */
  withoutReasoning(content: string): string {
    const marker = '</think>';
    const at = this.#cutsReasoning === 'first' ? content.indexOf(marker) : content.lastIndexOf(marker);
    return this.#cutsReasoning === null || at < 0 ? content : content.slice(at + marker.length);
  }

  render(input: TemplateInput): string {
    let rendered: string;
    try {
      rendered = this.#template.render({
        ...this.specialTokens,
        messages: input.messages,
        ...(input.tools ? { tools: input.tools } : {}),
        ...(input.thinking === undefined ? {} : { thinking: input.thinking, enable_thinking: input.thinking }),
        add_generation_prompt: input.noGenerationPrompt !== true,
      });
    } catch (error) {
      throw new ApiError(
        'template_error',
        `The model's chat template refused this conversation: ${(error as Error).message}`,
        'messages',
      );
    }
    if (rendered.length > MAX_RENDERED_CHARACTERS) {
      throw new ApiError(
        'template_error',
        `The rendered conversation has ${rendered.length} characters; shorten it.`,
        'messages',
      );
    }
    return rendered;
  }
}

function sourceOf(chatTemplate: unknown): string | null {
  if (typeof chatTemplate === 'string') return chatTemplate;
  if (!Array.isArray(chatTemplate)) return null;
  const named = chatTemplate as { name?: string; template?: string }[];
  return (named.find((entry) => entry.name === 'default') ?? named[0])?.template ?? null;
}

function specialTokensOf(config: Record<string, unknown>): Record<string, string> {
  const tokens: Record<string, string> = {};
  for (const [key, value] of Object.entries(config)) {
    if (!/^(bos|eos|unk|pad|sep|cls|mask)_token$/.test(key)) continue;
    const content = typeof value === 'string' ? value : (value as { content?: unknown } | null)?.content;
    if (typeof content === 'string') tokens[key] = content;
  }
  return tokens;
}
