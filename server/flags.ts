/** Every flag and RODIN_* variable: one table, from which parsing, checking and --help come. */
import { fileURLToPath } from 'node:url';
import {
  nonEmpty,
  folder,
  origin,
  zmqAddress,
  httpUrl,
  device,
  choice,
  integer,
  share,
  boolean,
  bytes,
} from './flag-values.js';

export type CommandName = 'serve' | 'logits' | 'bench' | 'doctor' | 'build';
export type FlagValue = string | number | boolean | string[] | null;

export interface Flag {
  name: string;
  commands: readonly CommandName[];
  /** shown after the name in --help; none for a switch */
  value?: string;
  default: FlagValue;
  /** shown instead of the default itself */
  defaultText?: string;
  help: string;
  /** text -> value; throws a sentence's end such as "must be ..." */
  parse(text: string): FlagValue;
  isList?: boolean;
  isSwitch?: boolean;
  isRequired?: boolean;
}

const RUN = ['serve', 'logits', 'bench'] as const;
const ALL = ['serve', 'logits', 'bench', 'doctor'] as const;
const SERVE = ['serve'] as const;
const LOGITS = ['logits'] as const;
const BENCH = ['bench'] as const;
const BUNDLED_MODEL = fileURLToPath(new URL('../models/pocket-r1', import.meta.url));
/** what a step batch can carry for one sequence */
const MAX_SPECULATIVE_TOKENS = 4;
const THINKING_END_PHRASE = '\nThat is enough thinking, so I answer now.\n';
const THINKING_EXTEND_PHRASE = '\nWait, let me check that again.\n';
const LOG_LEVELS = ['fatal', 'error', 'warn', 'info', 'debug', 'trace', 'silent'];

export const FLAGS: readonly Flag[] = [
  {
    name: 'model',
    commands: ALL,
    value: 'DIR',
    default: BUNDLED_MODEL,
    defaultText: 'the bundled models/pocket-r1',
    parse: folder,
    help: 'checkpoint folder in the Hugging Face layout',
  },
  { name: 'host', commands: SERVE, value: 'HOST', default: '127.0.0.1', parse: nonEmpty, help: 'address to listen on' },
  {
    name: 'port',
    commands: SERVE,
    value: 'PORT',
    default: 8000,
    parse: integer(0, 65535),
    help: 'port to listen on; 0 takes a free one',
  },
  {
    name: 'served-model-name',
    commands: SERVE,
    value: 'NAME',
    default: [],
    defaultText: "the folder's name",
    parse: nonEmpty,
    isList: true,
    help: 'model id that clients use; may be repeated, the first is the one in responses',
  },
  {
    name: 'api-key',
    commands: SERVE,
    value: 'KEY',
    default: [],
    defaultText: 'none: no key is asked for',
    parse: nonEmpty,
    isList: true,
    help: 'key that clients must send as bearer token; may be repeated',
  },
  {
    name: 'cors-origin',
    commands: SERVE,
    value: 'ORIGIN',
    default: [],
    defaultText: 'none',
    parse: origin,
    isList: true,
    help: "web origin that may call the API from a browser, or '*'; may be repeated",
  },
  { name: 'device', commands: ALL, value: 'DEVICE', default: 'auto', parse: device, help: 'auto, cpu or cuda:N' },
  {
    name: 'compute',
    commands: RUN,
    value: 'MODE',
    default: 'auto',
    parse: choice(['auto', 'float32']),
    help: "auto (the device's fast path) or float32 (the readable reference)",
  },
  {
    name: 'threads',
    commands: ALL,
    value: 'N',
    default: null,
    defaultText: 'one per core',
    parse: integer(1, 1024),
    help: 'compute threads on the CPU',
  },
  {
    name: 'max-num-seqs',
    commands: SERVE,
    value: 'N',
    default: 64,
    parse: integer(1, 4096),
    help: 'most sequences in one step',
  },
  {
    name: 'max-step-tokens',
    commands: SERVE,
    value: 'N',
    default: 512,
    parse: integer(1, 1 << 20),
    help: 'token budget of one step; longer prompts are prefilled in chunks',
  },
  {
    name: 'cache-memory',
    commands: SERVE,
    value: 'BYTES',
    default: null,
    defaultText: 'CPU: what is of use, at most half of the free memory; GPU: see --gpu-memory-utilization',
    parse: bytes,
    help: 'memory for the latent cache, e.g. 512MiB or 8GiB',
  },
  {
    name: 'gpu-memory-utilization',
    commands: SERVE,
    value: 'SHARE',
    default: null,
    defaultText: '0.92',
    parse: share,
    help: "share of the GPU's memory for weights, workspace and latent cache, which gets what the others leave",
  },
  {
    name: 'kv-cache-dtype',
    commands: ['serve', 'bench'],
    value: 'DTYPE',
    default: 'auto',
    parse: choice(['auto', 'bf16', 'fp8']),
    help: 'latent cache on a GPU: bf16 (auto) or fp8, which holds 1.8 times the tokens with less precision',
  },
  {
    name: 'block-size',
    commands: SERVE,
    value: 'N',
    default: 64,
    parse: integer(1, 1024),
    help: 'tokens in one cache block',
  },
  {
    name: 'speculative-tokens',
    commands: SERVE,
    value: 'N',
    default: 'auto',
    parse: (text) => (text === 'auto' ? text : integer(0, MAX_SPECULATIVE_TOKENS, "'auto' or ")(text)),
    help: 'tokens that the MTP layer drafts a step, 0 to 4, or auto: as many as pay; outputs stay the same',
  },
  {
    name: 'max-model-len',
    commands: SERVE,
    value: 'N',
    default: null,
    defaultText: "the checkpoint's",
    parse: integer(2, 1 << 24),
    help: 'longest prompt and completion together',
  },
  {
    name: 'max-queue',
    commands: SERVE,
    value: 'N',
    default: 512,
    parse: integer(0, 1 << 20),
    help: 'most requests waiting; more get status 429',
  },
  {
    name: 'max-body-size',
    commands: SERVE,
    value: 'BYTES',
    default: 8 << 20,
    defaultText: '8MiB',
    parse: bytes,
    help: 'longest request body',
  },
  {
    name: 'reasoning-field',
    commands: SERVE,
    value: 'FIELD',
    default: 'reasoning_content',
    parse: choice(['reasoning_content', 'reasoning', 'both']),
    help: 'field of a message that holds the reasoning: reasoning_content, reasoning or both',
  },
  {
    name: 'reasoning-format',
    commands: SERVE,
    value: 'FORMAT',
    default: 'auto',
    parse: choice(['auto', 'none', 'r1-zero']),
    help: "auto (a field of its own), none (part of the content), or r1-zero: that model's template and tags",
  },
  {
    name: 'thinking-end-phrase',
    commands: SERVE,
    value: 'TEXT',
    default: THINKING_END_PHRASE,
    defaultText: JSON.stringify(THINKING_END_PHRASE),
    parse: (text) => text.replaceAll('\\n', '\n'),
    help: 'what the model is made to think where its reasoning is ended; \\n is a line break',
  },
  {
    name: 'thinking-extend-phrase',
    commands: SERVE,
    value: 'TEXT',
    default: THINKING_EXTEND_PHRASE,
    defaultText: JSON.stringify(THINKING_EXTEND_PHRASE),
    parse: (text) => nonEmpty(text).replaceAll('\\n', '\n'),
    help: 'what the model is made to think where it would end reasoning that a client has extended',
  },
  {
    name: 'thinking-loop-tokens',
    commands: SERVE,
    value: 'N',
    default: 256,
    parse: integer(0, 1 << 20),
    help: 'reasoning that repeats itself for so many tokens is ended; 0 never ends it',
  },
  {
    name: 'stream-resume',
    commands: SERVE,
    value: 'SECONDS',
    default: 60,
    parse: integer(0, 3600),
    help: 'time in which a chat stream that was cut off can be gone on with; 0 keeps no events',
  },
  {
    name: 'response-store',
    commands: SERVE,
    value: 'FILE',
    default: null,
    defaultText: 'memory',
    parse: nonEmpty,
    help: 'SQLite database that keeps the responses of /v1/responses, made where it is not there; needs Node 22.13 or later',
  },
  {
    name: 'response-store-size',
    commands: SERVE,
    value: 'BYTES',
    default: 256 << 20,
    defaultText: '256MiB',
    parse: bytes,
    help: 'most bytes of stored responses; the ones used longest ago make room',
  },
  {
    name: 'max-sockets',
    commands: SERVE,
    value: 'N',
    default: 256,
    parse: integer(0, 65536),
    help: 'most WebSockets at once on /v1/responses; 0 takes none',
  },
  {
    name: 'max-lanes',
    commands: SERVE,
    value: 'N',
    default: 64,
    parse: integer(1, 4096),
    help: 'most lanes of one WebSocket, each with its stream_id: responses that run at the same time',
  },
  {
    name: 'socket-idle',
    commands: SERVE,
    value: 'SECONDS',
    default: 3600,
    parse: integer(1, 86400),
    help: 'a WebSocket on which nothing runs is closed when no frame has come for so long',
  },
  {
    name: 'shutdown-timeout',
    commands: SERVE,
    value: 'SECONDS',
    default: 30,
    parse: integer(0, 86400),
    help: 'time that running requests get to finish on SIGTERM',
  },
  {
    name: 'log-level',
    commands: SERVE,
    value: 'LEVEL',
    default: 'info',
    parse: choice(LOG_LEVELS),
    help: LOG_LEVELS.join(', '),
  },
  {
    name: 'log-format',
    commands: SERVE,
    value: 'FORMAT',
    default: 'auto',
    parse: choice(['auto', 'text', 'json']),
    help: 'text, json, or auto: text on a terminal, json elsewhere',
  },
  {
    name: 'otlp-traces-endpoint',
    commands: SERVE,
    value: 'URL',
    default: null,
    defaultText: 'off',
    parse: httpUrl,
    help: 'OpenTelemetry collector that gets a trace of each request, e.g. http://localhost:4318/v1/traces',
  },
  {
    name: 'kv-events',
    commands: SERVE,
    value: 'ADDRESS',
    default: null,
    defaultText: 'off',
    parse: zmqAddress,
    help: 'address such as tcp://*:5557 on which routers read, by ZeroMQ, what the prefix cache holds',
  },
  {
    name: 'kv-events-topic',
    commands: SERVE,
    value: 'TOPIC',
    default: null,
    defaultText: 'kv@HOSTNAME@MODEL',
    parse: nonEmpty,
    help: 'topic of those messages, by which routers tell servers and models apart',
  },
  {
    name: 'prompts',
    commands: LOGITS,
    value: 'FILE',
    default: null,
    parse: nonEmpty,
    isRequired: true,
    help: 'prompts, one {"ids": [...]} a line',
  },
  {
    name: 'out',
    commands: LOGITS,
    value: 'FILE',
    default: null,
    parse: nonEmpty,
    isRequired: true,
    help: 'where the logits go, one line for each prompt',
  },
  {
    name: 'last',
    commands: LOGITS,
    value: 'K',
    default: 16,
    parse: integer(1, 1 << 20),
    help: 'number of last positions whose logits are written',
  },
  {
    name: 'draft',
    commands: LOGITS,
    default: false,
    parse: boolean,
    isSwitch: true,
    help: "write the MTP module's logits too",
  },
  {
    name: 'weights',
    commands: BENCH,
    value: 'WHICH',
    default: 'checkpoint',
    parse: choice(['checkpoint', 'synthetic']),
    help: 'checkpoint, or synthetic: random ones, for which --model may be a config.json alone',
  },
  {
    name: 'layers',
    commands: BENCH,
    value: 'N',
    default: null,
    defaultText: 'all',
    parse: integer(1, 1024),
    help: 'decoder layers of synthetic weights: at most one dense layer, then MoE layers',
  },
  {
    name: 'batch',
    commands: BENCH,
    value: 'N,N,...',
    default: ['1', '8', '32'],
    defaultText: '1,8,32',
    parse: (text) => text.split(',').map((part) => String(integer(1, 4096)(part.trim()))),
    help: 'sequences in a decode step, one case each',
  },
  {
    name: 'context',
    commands: BENCH,
    value: 'N',
    default: 1024,
    parse: integer(0, 1 << 24),
    help: 'tokens of each sequence before a decode step',
  },
  {
    name: 'prompt',
    commands: BENCH,
    value: 'N',
    default: 512,
    parse: integer(0, 1 << 20),
    help: 'tokens of a prefill step; 0 leaves it out',
  },
  {
    name: 'cpu-path',
    commands: BENCH,
    value: 'PATH',
    default: 'auto',
    parse: nonEmpty,
    help: 'instruction path on the CPU, such as avx512 or portable; auto takes the best',
  },
  {
    name: 'json',
    commands: BENCH,
    default: false,
    parse: boolean,
    isSwitch: true,
    help: 'print one JSON object in place of the table',
  },
];

export function variableOf(flag: Flag): string {
  return `RODIN_${flag.name.replaceAll('-', '_').toUpperCase()}`;
}
