/** The command line and RODIN_* variables -> one frozen object; --help comes from the same table (flags.ts). */
import { readFileSync } from 'node:fs';
import { resolve } from 'node:path';
import { parseArgs } from 'node:util';
import { StartupError } from './errors.js';
import { FLAGS, variableOf, type CommandName, type Flag, type FlagValue } from './flags.js';

export type ReasoningField = 'reasoning_content' | 'reasoning' | 'both';
export type LogLevel = 'fatal' | 'error' | 'warn' | 'info' | 'debug' | 'trace' | 'silent';

export interface ServeConfig {
  readonly model: string;
  readonly host: string;
  readonly port: number;
  readonly servedModelNames: readonly string[];
  readonly apiKeys: readonly string[];
  readonly corsOrigins: readonly string[];
  /** 'auto', 'cpu' or 'cuda:N' */
  readonly device: string;
  readonly compute: 'auto' | 'float32';
  /** synthetic: random ones of the shape that config.json describes */
  readonly weights: 'checkpoint' | 'synthetic';
  /** null: one per core */
  readonly threads: number | null;
  readonly maxNumSeqs: number;
  /** null: what suits the device */
  readonly maxStepTokens: number | null;
  /** null: what fits into free memory and is of use */
  readonly cacheMemory: number | null;
  /** share of a GPU's memory for weights, workspace and cache; null: the usual one */
  readonly gpuMemoryUtilization: number | null;
  readonly kvCacheDtype: 'auto' | 'bf16' | 'fp8';
  readonly headDtype: 'auto' | 'fp8';
  /** one regime of kernels for any number of tokens */
  readonly deterministic: boolean;
  readonly blockSize: number;
  /** drafts of the MTP layer a step */
  readonly speculativeTokens: number | 'auto';
  /** null: what the checkpoint says */
  readonly maxModelLen: number | null;
  readonly maxQueue: number;
  readonly maxBodyBytes: number;
  readonly reasoningField: ReasoningField;
  readonly reasoningFormat: 'auto' | 'none' | 'r1-zero';
  readonly thinkingEndPhrase: string;
  readonly thinkingExtendPhrase: string;
  readonly thinkingLoopTokens: number;
  /** what a conversation's next prompt will begin with is computed in idle time */
  readonly prewarm: boolean;
  /** where traces go; null: there are none */
  readonly otlpTracesEndpoint: string | null;
  /** ZeroMQ address to publish cache events on; null: none are published */
  readonly kvEvents: string | null;
  /** null: kv@HOSTNAME@MODEL */
  readonly kvEventsTopic: string | null;
  readonly logLevel: LogLevel;
  readonly logFormat: 'auto' | 'text' | 'json';
  /** seconds */
  /** seconds in which a stream that was cut off can be gone on with; 0: not at all */
  readonly streamResume: number;
  /** SQLite file; null: responses are kept in memory */
  readonly responseStore: string | null;
  /** bytes */
  readonly responseStoreSize: number;
  readonly maxSockets: number;
  /** of one socket */
  readonly maxLanes: number;
  /** seconds */
  readonly socketIdle: number;
  readonly shutdownTimeout: number;
  /** things to log once there is a logger */
  readonly warnings: readonly string[];
}

/** What `serve` can be told, by programs: the flags' names in camelCase, texts or numbers as on the command line. */
export type ServeOptions = {
  -readonly [Key in keyof Omit<ServeConfig, 'warnings' | RenamedKey>]?: Option<ServeConfig[Key]>;
} & { [Key in RenamedKey as Renamed[Key]]?: Option<ServeConfig[Key]> };

type Option<Value> = Value | string | undefined;
type RenamedKey = keyof Renamed;

/** Fields whose flag has another name: camelCase of that. */
interface Renamed {
  servedModelNames: 'servedModelName';
  apiKeys: 'apiKey';
  corsOrigins: 'corsOrigin';
  maxBodyBytes: 'maxBodySize';
}

export interface LogitsConfig {
  readonly model: string;
  readonly prompts: string;
  readonly out: string;
  readonly device: string;
  readonly compute: 'auto' | 'float32';
  readonly threads: number | null;
  readonly headDtype?: ServeConfig['headDtype'];
  readonly deterministic: boolean;
  readonly last: number;
  readonly draft: boolean;
}

export interface DoctorConfig {
  readonly model: string;
  readonly device: string;
  readonly threads: number | null;
}

export interface BenchConfig {
  /** checkpoint folder; with synthetic weights a config.json too */
  readonly model: string;
  readonly weights: 'checkpoint' | 'synthetic';
  /** null: all */
  readonly layers: number | null;
  readonly batches: readonly number[];
  readonly context: number;
  /** 0: no prefill case */
  readonly prompt: number;
  readonly device: string;
  readonly compute: 'auto' | 'float32';
  readonly cpuPath: string;
  readonly kvCacheDtype: ServeConfig['kvCacheDtype'];
  readonly headDtype: ServeConfig['headDtype'];
  readonly deterministic: boolean;
  readonly threads: number | null;
  readonly json: boolean;
}

const BENCH_SUBJECTS = ['step', 'ops'] as const;
export type BenchSubject = (typeof BENCH_SUBJECTS)[number];

export type Command =
  | { kind: 'print'; text: string }
  | { kind: 'serve'; config: ServeConfig }
  | { kind: 'logits'; config: LogitsConfig }
  | { kind: 'bench'; what: BenchSubject; config: BenchConfig }
  | { kind: 'doctor'; config: DoctorConfig }
  | { kind: 'build' };

const COMMANDS: Record<CommandName, string> = {
  serve: 'serves a checkpoint behind an OpenAI-compatible API',
  logits: 'writes the logits of given prompts: the tool that proves parity',
  bench: "'rodin bench step' times steps of the runner, 'rodin bench ops' single ops, beside what the machine could do",
  doctor: 'says what this machine has, what Rodin sees of it, and what it would use',
  build: 'builds the native addon on this machine, where the one in the package does not load',
};

/** Throws StartupError for anything it does not know or cannot use. */
export function readCommandLine(argv: readonly string[], env: NodeJS.ProcessEnv): Command {
  const [first, ...rest] = argv;
  if (first === '--version' || first === '-v') return { kind: 'print', text: `rodin ${packageVersion()}` };
  if (first === undefined || first === '--help' || first === '-h' || first === 'help')
    return { kind: 'print', text: overview() };
  if (!Object.hasOwn(COMMANDS, first)) {
    throw new StartupError(`There is no command '${first}'; the commands are ${Object.keys(COMMANDS).join(', ')}.`);
  }
  const command = first as CommandName;
  let subject: BenchSubject = 'step';
  if (command === 'bench') {
    const named = BENCH_SUBJECTS.find((name) => name === rest[0]);
    if (named !== undefined) rest.shift();
    else if (!rest.some((text) => text === '--help' || text === '-h'))
      throw new StartupError(`'rodin bench' measures steps or ops: write 'rodin bench step' or 'rodin bench ops'.`);
    subject = named ?? subject;
  }
  const flags = FLAGS.filter((flag) => flag.commands.includes(command));
  const { given, isHelp, isVersion } = parseFlags(command, flags, rest);
  if (isHelp) return { kind: 'print', text: helpOf(command, flags) };
  if (isVersion) return { kind: 'print', text: `rodin ${packageVersion()}` };
  const values = Object.fromEntries(flags.map((flag) => [flag.name, valueOf(command, flag, given[flag.name], env)]));
  switch (command) {
    case 'serve':
      return { kind: 'serve', config: serveConfig(values, env) };
    case 'logits':
      return { kind: 'logits', config: logitsConfig(values) };
    case 'bench':
      return { kind: 'bench', what: subject, config: benchConfig(values) };
    case 'doctor':
      return { kind: 'doctor', config: doctorConfig(values) };
    case 'build':
      return { kind: 'build' };
  }
}

/** Options of a program, checked as flags are; no variable is read. Throws StartupError. */
export function serveConfigOf(options: ServeOptions): ServeConfig {
  const flags = FLAGS.filter((flag) => flag.commands.includes('serve'));
  const byOption = new Map(flags.map((flag) => [camelCase(flag.name), flag]));
  const values = Object.fromEntries(flags.map((flag) => [flag.name, flag.default]));
  for (const [option, value] of Object.entries(options)) {
    if (value === undefined || value === null) continue;
    const flag = byOption.get(option);
    if (flag === undefined) {
      throw new StartupError(`There is no option '${option}'; there are ${[...byOption.keys()].join(', ')}.`);
    }
    values[flag.name] = parse(flag, Array.isArray(value) ? value.map(String) : [String(value)], option);
  }
  return serveConfig(values, {});
}

function camelCase(name: string): string {
  return name.replace(/-(\w)/g, (_, letter: string) => letter.toUpperCase());
}

export function packageVersion(): string {
  const text = readFileSync(new URL('../package.json', import.meta.url), 'utf8');
  return (JSON.parse(text) as { version: string }).version;
}

function serveConfig(values: Record<string, FlagValue>, env: NodeJS.ProcessEnv): ServeConfig {
  const known = new Set(FLAGS.map((flag) => variableOf(flag)));
  const config: ServeConfig = {
    model: values['model'] as string,
    host: values['host'] as string,
    port: values['port'] as number,
    servedModelNames: Object.freeze(values['served-model-name'] as string[]),
    apiKeys: Object.freeze(values['api-key'] as string[]),
    corsOrigins: Object.freeze(values['cors-origin'] as string[]),
    device: values['device'] as string,
    compute: values['compute'] as ServeConfig['compute'],
    threads: values['threads'] as number | null,
    maxNumSeqs: values['max-num-seqs'] as number,
    maxStepTokens: values['max-step-tokens'] as number | null,
    cacheMemory: values['cache-memory'] as number | null,
    gpuMemoryUtilization: values['gpu-memory-utilization'] as number | null,
    kvCacheDtype: values['kv-cache-dtype'] as ServeConfig['kvCacheDtype'],
    headDtype: values['head-dtype'] as ServeConfig['headDtype'],
    deterministic: values['deterministic'] as boolean,
    blockSize: values['block-size'] as number,
    speculativeTokens: values['speculative-tokens'] as ServeConfig['speculativeTokens'],
    maxModelLen: values['max-model-len'] as number | null,
    weights: values['weights'] as ServeConfig['weights'],
    maxQueue: values['max-queue'] as number,
    maxBodyBytes: values['max-body-size'] as number,
    reasoningField: values['reasoning-field'] as ReasoningField,
    reasoningFormat: values['reasoning-format'] as ServeConfig['reasoningFormat'],
    thinkingEndPhrase: values['thinking-end-phrase'] as string,
    thinkingExtendPhrase: values['thinking-extend-phrase'] as string,
    thinkingLoopTokens: values['thinking-loop-tokens'] as number,
    prewarm: values['prewarm'] as boolean,
    otlpTracesEndpoint: values['otlp-traces-endpoint'] as string | null,
    kvEvents: values['kv-events'] as string | null,
    kvEventsTopic: values['kv-events-topic'] as string | null,
    logLevel: values['log-level'] as LogLevel,
    logFormat: values['log-format'] as ServeConfig['logFormat'],
    streamResume: values['stream-resume'] as number,
    responseStore: values['response-store'] as string | null,
    responseStoreSize: values['response-store-size'] as number,
    maxSockets: values['max-sockets'] as number,
    maxLanes: values['max-lanes'] as number,
    socketIdle: values['socket-idle'] as number,
    shutdownTimeout: values['shutdown-timeout'] as number,
    warnings: Object.freeze(
      Object.keys(env)
        .filter((name) => name.startsWith('RODIN_') && !known.has(name))
        .map((name) => `the environment variable ${name} is none of rodin's; 'rodin serve --help' lists them`),
    ),
  };
  if (config.maxStepTokens !== null && config.maxStepTokens < config.maxNumSeqs) {
    throw new StartupError(
      `--max-step-tokens (${config.maxStepTokens}) must be at least --max-num-seqs (${config.maxNumSeqs}): ` +
        `each sequence needs a token in every step.`,
    );
  }
  return Object.freeze(config);
}

function logitsConfig(values: Record<string, FlagValue>): LogitsConfig {
  return Object.freeze({
    model: values['model'] as string,
    prompts: resolve(values['prompts'] as string),
    out: resolve(values['out'] as string),
    device: values['device'] as string,
    compute: values['compute'] as LogitsConfig['compute'],
    threads: values['threads'] as number | null,
    headDtype: values['head-dtype'] as ServeConfig['headDtype'],
    deterministic: values['deterministic'] as boolean,
    last: values['last'] as number,
    draft: values['draft'] as boolean,
  });
}

function doctorConfig(values: Record<string, FlagValue>): DoctorConfig {
  return Object.freeze({
    model: values['model'] as string,
    device: values['device'] as string,
    threads: values['threads'] as number | null,
  });
}

function benchConfig(values: Record<string, FlagValue>): BenchConfig {
  return Object.freeze({
    model: values['model'] as string,
    weights: values['weights'] as BenchConfig['weights'],
    layers: values['layers'] as number | null,
    batches: Object.freeze((values['batch'] as string[]).map(Number)),
    context: values['context'] as number,
    prompt: values['prompt'] as number,
    device: values['device'] as string,
    compute: values['compute'] as BenchConfig['compute'],
    cpuPath: values['cpu-path'] as string,
    kvCacheDtype: values['kv-cache-dtype'] as ServeConfig['kvCacheDtype'],
    headDtype: values['head-dtype'] as ServeConfig['headDtype'],
    deterministic: values['deterministic'] as boolean,
    threads: values['threads'] as number | null,
    json: values['json'] as boolean,
  });
}

interface ParsedFlags {
  given: Record<string, string[] | undefined>;
  isHelp: boolean;
  isVersion: boolean;
}

function parseFlags(command: CommandName, flags: readonly Flag[], args: string[]): ParsedFlags {
  const options = Object.fromEntries(
    flags.map((flag) => [flag.name, { type: flag.isSwitch ? 'boolean' : 'string', multiple: true } as const]),
  );
  const more = `'rodin ${command} --help' lists the flags.`;
  let values: Record<string, unknown>;
  try {
    values = parseArgs({
      args,
      options: { ...options, help: { type: 'boolean', short: 'h' }, version: { type: 'boolean', short: 'v' } },
      allowPositionals: false,
    }).values;
  } catch (error) {
    const unknown = /Unknown option '([^']+)'/.exec((error as Error).message);
    if (unknown) throw new StartupError(`There is no flag ${unknown[1]}; ${more}`);
    const positional = /Unexpected argument '([^']*)'/.exec((error as Error).message);
    if (positional) throw new StartupError(`'${positional[1]}' belongs to no flag; ${more}`);
    throw new StartupError(`${(error as Error).message.split('\n')[0]!.replace(/\.$/, '')}; ${more}`);
  }
  const given: Record<string, string[] | undefined> = {};
  for (const flag of flags) given[flag.name] = (values[flag.name] as (string | boolean)[] | undefined)?.map(String);
  return { given, isHelp: values['help'] === true, isVersion: values['version'] === true };
}

/** The command line wins over the variable, the variable over the default. */
function valueOf(command: CommandName, flag: Flag, given: string[] | undefined, env: NodeJS.ProcessEnv): FlagValue {
  const variable = env[variableOf(flag)];
  const [texts, origin] =
    given !== undefined
      ? [given, `--${flag.name}`]
      : variable !== undefined && variable !== ''
        ? [flag.isList ? variable.split(',').map((part) => part.trim()) : [variable], variableOf(flag)]
        : [[], ''];
  if (texts.length === 0) {
    if (flag.isRequired)
      throw new StartupError(`--${flag.name} ${flag.value} is needed; 'rodin ${command} --help' says what it is.`);
    return flag.default;
  }
  return parse(flag, texts, origin);
}

function parse(flag: Flag, texts: string[], origin: string): FlagValue {
  if (texts.length > 1 && !flag.isList)
    throw new StartupError(`${origin} is given ${texts.length} times; give it once.`);
  const parsed = texts.map((text) => {
    try {
      return flag.parse(text);
    } catch (error) {
      throw new StartupError(`${origin} ${(error as Error).message}; it is '${text}'.`);
    }
  });
  return flag.isList ? (parsed as string[]) : parsed[0]!;
}

function overview(): string {
  const lines = Object.entries(COMMANDS).map(([name, about]) => `  rodin ${name.padEnd(8)}${about}`);
  return `rodin: reasoning models of the DeepSeek-V3/R1 family, served from their Hugging Face folder\n\n${lines.join('\n')}\n\nrodin COMMAND --help lists the flags of a command; rodin --version says the version.`;
}

function helpOf(command: CommandName, flags: readonly Flag[]): string {
  const lines = flags.map((flag) => {
    const name = `  --${flag.name}${flag.value ? ` ${flag.value}` : ''}`.padEnd(30);
    const value = Array.isArray(flag.default) ? flag.default.join(',') : String(flag.default);
    const note = flag.isRequired ? 'needed' : flag.isSwitch ? 'off' : (flag.defaultText ?? value);
    return `${name}${flag.help}\n${' '.repeat(30)}[${note}; ${variableOf(flag)}]`;
  });
  const about = `rodin ${command}: ${COMMANDS[command]}`;
  if (lines.length === 0) return `${about}\n\nIt has no flags.`;
  return `${about}\n\n${lines.join('\n')}\n\nEach flag can also be given as the variable named beside it; lists are separated by commas there.`;
}
