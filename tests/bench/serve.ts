import { readFileSync } from 'node:fs';
import { Agent } from 'node:http';
import { Agent as HttpsAgent } from 'node:https';
import { parseArgs } from 'node:util';
import { runLoad, seededRandom, type Arrival } from './load.js';
import { modelAt } from './model-at.js';
import { reportOf, tableOf } from './report.js';
import { timeRequest, type Target } from './request.js';

const HELP = `Measures any server with an OpenAI-compatible chat API.

  node --import tsx tests/bench/serve.ts --url http://127.0.0.1:8000/v1 [flags]

  --url URL            base URL of the API (http://127.0.0.1:8000/v1)
  --model NAME         model to ask for (the first that /models lists)
  --requests N         requests that are measured, 1 to 100000 (64)
  --warmup N           requests before them, not measured, 0 to 1000 (2)
  --concurrency N      closed loop: so many clients, each sending when its last has ended, 1 to 1024 (16)
  --rate R             open loop instead: R requests a second on average, arriving at random, above 0 to 10000
  --max-in-flight N    open loop: more than this are not sent but counted as skipped, 1 to 4096 (512)
  --max-tokens N       limit of each completion, 1 to 1000000 (128)
  --ignore-eos         completions go on to that limit (a field that Rodin, vLLM and SGLang know)
  --temperature T      0 to 2 (0)
  --prompts FILE       JSON lines with "messages", taken in turn; else multiplications to solve
  --input-words N      random words before each prompt, so that no prefix is cached, 0 to 100000 (0)
  --max-seconds S      everything is cut after that, 1 to 3600 (300)
  --timeout-seconds S  a request is given up when no byte comes for that long, 1 to 3600 (120)
  --api-key-env NAME   environment variable that holds the API key
  --allow-remote       lets --url be another machine than this one
  --json               prints the figures as JSON

TTFT: to the first token, from when the request was due. TTFA: to the first token of the answer. ITL: between two events
with tokens. TPOT: from first to last token, per token after the first. E2E: to the end. Times are in milliseconds.
`;

interface Question {
  messages: { role: string; content: string }[];
}

process.exitCode = await main(process.argv.slice(2)).catch((error: unknown) => {
  process.stderr.write(`${(error as Error).message}\n`);
  return 2;
});

/** 1 where a request failed, so that a script notices. */
async function main(args: string[]): Promise<number> {
  const { values } = parseArgs({
    args,
    options: {
      url: { type: 'string', default: 'http://127.0.0.1:8000/v1' },
      model: { type: 'string' },
      requests: { type: 'string', default: '64' },
      warmup: { type: 'string', default: '2' },
      concurrency: { type: 'string' },
      rate: { type: 'string' },
      'max-in-flight': { type: 'string', default: '512' },
      'max-tokens': { type: 'string', default: '128' },
      'ignore-eos': { type: 'boolean', default: false },
      temperature: { type: 'string', default: '0' },
      prompts: { type: 'string' },
      'input-words': { type: 'string', default: '0' },
      'max-seconds': { type: 'string', default: '300' },
      'timeout-seconds': { type: 'string', default: '120' },
      'api-key-env': { type: 'string' },
      'allow-remote': { type: 'boolean', default: false },
      json: { type: 'boolean', default: false },
      help: { type: 'boolean', default: false },
    },
  });
  if (values.help) {
    process.stdout.write(HELP);
    return 0;
  }
  if (values.rate !== undefined && values.concurrency !== undefined) {
    throw new Error('--rate is an open loop and --concurrency a closed one; give one of them.');
  }
  const count = (name: keyof typeof values, min: number, max: number): number =>
    numberOf(name, String(values[name]), min, max, true);
  const arrival: Arrival =
    values.rate === undefined
      ? { kind: 'closed', concurrency: numberOf('concurrency', values.concurrency ?? '16', 1, 1024, true) }
      : {
          kind: 'open',
          perSecond: numberOf('rate', values.rate, 1e-6, 10_000, false),
          maxInFlight: count('max-in-flight', 1, 4096),
        };
  const url = urlOf(values.url, values['allow-remote']);
  const AgentOf = url.protocol === 'https:' ? HttpsAgent : Agent;
  const agent = new AgentOf({ keepAlive: true });
  const timeoutMs = 1000 * count('timeout-seconds', 1, 3600);
  const target: Target = { url, apiKey: apiKeyOf(values['api-key-env']), agent, timeoutMs };
  const model = values.model ?? (await modelAt(target.url.href.replace(/\/$/, ''), target.apiKey));
  const questions = values.prompts === undefined ? null : readQuestions(values.prompts);
  const numWords = count('input-words', 0, 100_000);
  const shared = {
    model,
    stream: true,
    stream_options: { include_usage: true },
    max_tokens: count('max-tokens', 1, 1_000_000),
    temperature: numberOf('temperature', values.temperature, 0, 2, false),
    ...(values['ignore-eos'] ? { ignore_eos: true } : {}),
  };
  const send = (index: number, dueAt: number, signal: AbortSignal) => {
    const question = questions?.[index % questions.length] ?? multiplication(index);
    return timeRequest(target, { ...shared, ...withWords(question, numWords, index) }, dueAt, signal);
  };
  const numWarmup = count('warmup', 0, 1000);
  const maxMs = 1000 * count('max-seconds', 1, 3600);
  const numRequests = count('requests', 1, 100_000);
  // Warm-up prompts are others than the measured ones: their prefixes must not be found in the cache.
  const warmup = await runLoad(numWarmup, { kind: 'closed', concurrency: 1 }, maxMs, (index, ...rest) =>
    send(numRequests + index, ...rest),
  );
  const broken = warmup.samples.find(({ error }) => error !== null);
  if (broken) throw new Error(`${url.href} does not answer as it should: ${broken.error}`);
  const report = reportOf(await runLoad(numRequests, arrival, maxMs, send));
  agent.destroy();
  process.stdout.write(
    `${values.json ? JSON.stringify({ url: url.href, model, arrival, ...report }) : tableOf(report)}\n`,
  );
  return report.failed + report.skipped > 0 || report.requests < numRequests ? 1 : 0;
}

function numberOf(name: string, text: string, min: number, max: number, isWhole: boolean): number {
  const value = text.trim() === '' ? NaN : Number(text);
  if (value >= min && value <= max && (!isWhole || Number.isInteger(value))) return value;
  throw new Error(
    `--${name} must be ${isWhole ? 'a whole number' : 'a number'} from ${min} to ${max}; it is '${text}'.`,
  );
}

function urlOf(text: string, allowsRemote: boolean): URL {
  if (!URL.canParse(text)) throw new Error(`--url must be a URL like http://127.0.0.1:8000/v1; it is '${text}'.`);
  const url = new URL(text.endsWith('/') ? text : `${text}/`);
  if (url.protocol !== 'http:' && url.protocol !== 'https:')
    throw new Error('--url must begin with http:// or https://.');
  const isHere = /^(localhost|127(\.\d+){3}|\[::1\])$/.test(url.hostname);
  if (!isHere && !allowsRemote) {
    throw new Error(`${url.hostname} is not this machine; --allow-remote sends load there nevertheless.`);
  }
  return url;
}

function apiKeyOf(name: string | undefined): string | null {
  if (name === undefined) return null;
  const key = process.env[name];
  if (!key) throw new Error(`--api-key-env names ${name}, which is not set.`);
  return key;
}

function readQuestions(file: string): Question[] {
  const lines = readFileSync(file, 'utf8').split('\n').filter(Boolean);
  const questions = lines.map((line, index) => {
    const { messages } = JSON.parse(line) as Partial<Question>;
    if (!Array.isArray(messages)) throw new Error(`${file}, line ${index + 1}: there are no "messages".`);
    return { messages };
  });
  if (questions.length === 0) throw new Error(`${file} has no lines.`);
  return questions;
}

function multiplication(index: number): Question {
  const random = seededRandom(index + 1);
  const [a, b] = [Math.floor(100 + random() * 900), Math.floor(10 + random() * 90)];
  return { messages: [{ role: 'user', content: `What is ${a} × ${b}?` }] };
}

function withWords({ messages }: Question, numWords: number, index: number): Question {
  if (numWords === 0) return { messages };
  const random = seededRandom(0x5eed + index);
  const words = Array.from({ length: numWords }, () => Math.floor(random() * 1e6).toString(36));
  return { messages: [{ role: 'system', content: words.join(' ') }, ...messages] };
}
