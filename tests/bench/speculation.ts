import { Agent } from 'node:http';
import { parseArgs } from 'node:util';
import type { Engine } from '../../server/engine/engine.js';
import { loadAddon } from '../../server/engine/load-addon.js';
import { startEngine, type EngineConfig } from '../../server/engine/start-engine.js';
import { MAX_DRAFTS } from '../../server/engine/step-batch.js';
import { usableCores } from '../../server/machine.js';
import { fixture, pooled, Server } from '../e2e/server.js';
import { makeRequest } from '../helpers/fake-runner.js';
import { ENGINE_CONFIG } from '../helpers/speculation-workload.js';
import { timeRequest } from './request.js';

const HELP = `Times speculation: one stream, or several, with different numbers of drafts, in turns, in one run. Prints one table.

  node --import tsx tests/bench/speculation.ts [flags]

  --model DIR      checkpoint folder (models/pocket-r1); another one gets the same token ids, in process alone
  --drafts LIST    values of --speculative-tokens (0,1,2,auto); the first is what the others are compared with
  --rounds N       times that each answers all prompts (8)
  --prompts N      of the reference outputs, the longest (6)
  --streams N      answered at once (1)
  --threads N      compute threads (one per core)
  --temperature T  0 to 2 (0)
  --no-http        in process only

In process: the engine's loop in this process. HTTP: a server of its own, streamed chat completions. Rates are tokens
after a completion's first over the time from that to its last; of several streams, all tokens over the whole time.
Ratios are those of one round's rates; rates and ratios are medians of all rounds.
`;

/** One way to serve with one number of drafts. */
interface Contestant {
  way: 'in process' | 'http';
  drafts: string;
  /** decodes prompt `index`: tokens after the first, and the milliseconds they took */
  decode(index: number): Promise<{ tokens: number; ms: number }>;
  drafted(): Promise<Drafted>;
  close(): Promise<void>;
  rates: number[]; // [num_rounds] tokens/s
}

/** Of all answers so far. */
interface Drafted {
  numRounds: number;
  numDrafts: number;
  accepted: readonly number[]; // [MAX_DRAFTS] by depth
}

interface Reference {
  messages: object[];
  thinking: boolean;
  prompt_ids: number[];
  output_ids: number[];
}

const { values } = parseArgs({
  options: {
    model: { type: 'string' },
    drafts: { type: 'string', default: '0,1,2,auto' },
    rounds: { type: 'string', default: '8' },
    prompts: { type: 'string', default: '6' },
    streams: { type: 'string', default: '1' },
    threads: { type: 'string', default: String(usableCores()) },
    temperature: { type: 'string', default: '0' },
    'no-http': { type: 'boolean', default: false },
    help: { type: 'boolean', default: false },
  },
});
if (values.help) process.stdout.write(HELP);
else {
  await main().catch((error: unknown) => {
    process.stderr.write(`${(error as Error).message}\n`);
    process.exitCode = 1;
  });
}

async function main(): Promise<void> {
  const drafts = values.drafts.split(',');
  if (drafts.some((one) => !/^([0-8]|auto)$/.test(one))) throw new Error('--drafts lists 0 to 8 and auto.');
  const [numRounds, numPrompts] = [count('rounds', 1000), count('prompts', 48)];
  const references = (fixture('greedy.jsonl') as Reference[])
    .filter(({ thinking }) => thinking)
    .sort((a, b) => b.output_ids.length - a.output_ids.length)
    .slice(0, numPrompts);
  const contestants: Contestant[] = [];
  try {
    for (const one of drafts) contestants.push(await inProcess(one, references));
    if (!values['no-http'] && values.model === undefined) {
      for (const one of drafts) contestants.push(await overHttp(one, references));
    }
    for (const contestant of contestants) await runRound(contestant, references.length); // warms up
    for (let round = 0; round < numRounds; round++) {
      const order = round % 2 === 0 ? contestants : contestants.toReversed();
      for (const contestant of order) contestant.rates.push(await runRound(contestant, references.length));
    }
    await print(contestants);
  } finally {
    await Promise.all(contestants.map((contestant) => contestant.close()));
  }
}

function count(name: 'rounds' | 'prompts' | 'streams' | 'threads', max: number): number {
  const value = Number(values[name]);
  if (!Number.isInteger(value) || value < 1 || value > max) {
    throw new Error(`--${name} is ${values[name]}; give a whole number from 1 to ${max}.`);
  }
  return value;
}

/** tokens/s */
async function runRound(contestant: Contestant, numPrompts: number): Promise<number> {
  const numStreams = count('streams', 32);
  const indices = Array.from({ length: numPrompts }, (_, index) => index);
  const startedAt = performance.now();
  const parts = await pooled(indices, numStreams, (index) => contestant.decode(index));
  const wallMs = performance.now() - startedAt;
  const sum = (of: (part: { tokens: number; ms: number }) => number): number =>
    parts.reduce((total, part) => total + of(part), 0);
  if (numStreams === 1) return (1000 * sum(({ tokens }) => tokens)) / sum(({ ms }) => ms);
  return (1000 * sum(({ tokens }) => tokens + 1)) / wallMs;
}

async function inProcess(drafts: string, references: Reference[]): Promise<Contestant> {
  const config: EngineConfig = {
    ...ENGINE_CONFIG,
    ...(values.model === undefined ? {} : { model: values.model }),
    blockSize: 64,
    numThreads: count('threads', 1024),
    speculativeTokens: drafts === 'auto' ? 'auto' : Number(drafts),
  };
  const engine: Engine = await startEngine(loadAddon(), config);
  const { vocabSize } = engine.limits;
  let numRequests = 0;
  return {
    way: 'in process',
    drafts,
    rates: [],
    async decode(index) {
      const { prompt_ids: ids, output_ids: output } = references[index]!;
      const sampling = { temperature: Number(values.temperature), seed: BigInt(index), maxTokens: output.length };
      const request = makeRequest(
        `request-${numRequests++}`,
        ids.map((id) => id % vocabSize),
        sampling,
      );
      let [numTokens, numFirst, firstAt] = [0, 0, 0];
      for await (const { tokens } of engine.submit(request)) {
        if (numTokens === 0) [numFirst, firstAt] = [tokens.length, performance.now()];
        numTokens += tokens.length;
      }
      return { tokens: numTokens - numFirst, ms: performance.now() - firstAt };
    },
    drafted: () => {
      const { specNumDrafts, specNumDraftTokens, specAcceptedPerPos } = engine.stats();
      return Promise.resolve({
        numRounds: specNumDrafts,
        numDrafts: specNumDraftTokens,
        accepted: specAcceptedPerPos,
      });
    },
    close: () => engine.close(),
  };
}

async function overHttp(drafts: string, references: Reference[]): Promise<Contestant> {
  const server = await Server.start('--speculative-tokens', drafts, '--threads', values.threads);
  const agent = new Agent({ keepAlive: true });
  const target = { url: new URL('/v1/', server.url), apiKey: null, agent, timeoutMs: 60_000 };
  return {
    way: 'http',
    drafts,
    rates: [],
    async decode(index) {
      const { messages, output_ids: output } = references[index]!;
      const body = {
        model: 'pocket-r1',
        messages,
        temperature: Number(values.temperature),
        seed: index,
        max_tokens: output.length,
        stream: true,
        stream_options: { include_usage: true },
      };
      const sample = await timeRequest(target, body, performance.now(), AbortSignal.timeout(60_000));
      if (sample.error !== null) throw new Error(sample.error);
      return { tokens: sample.completionTokens - 1, ms: sample.lastTokenAt! - sample.firstTokenAt! };
    },
    async drafted() {
      const numRounds = await server.metric('vllm:spec_decode_num_drafts_total');
      const numDrafts = await server.metric('vllm:spec_decode_num_draft_tokens_total');
      const accepted: number[] = [];
      for (let depth = 0; depth < MAX_DRAFTS; depth++) {
        const line = `vllm:spec_decode_num_accepted_tokens_per_pos_total{position="${depth}"`;
        accepted.push(await server.metric(line));
      }
      return { numRounds, numDrafts, accepted };
    },
    async close() {
      agent.destroy();
      await server.stop();
    },
  };
}

/** Drafts of a round that had any. */
function width({ numRounds, numDrafts }: Drafted): string {
  return numRounds === 0 ? '' : (numDrafts / numRounds).toFixed(1);
}

/** Chance that a draft is accepted, by depth where all rounds but the last of an answer have the same number. */
function acceptance(drafts: string, { numRounds, numDrafts, accepted }: Drafted): string {
  if (numDrafts === 0) return '';
  if (drafts === 'auto') return (accepted.reduce((sum, count) => sum + count, 0) / numDrafts).toFixed(2);
  const before = [numRounds, ...accepted];
  return accepted
    .slice(0, Number(drafts))
    .map((count, depth) => (count / before[depth]!).toFixed(2))
    .join(' ');
}

async function print(contestants: readonly Contestant[]): Promise<void> {
  const lines = [
    '|  | drafts | tokens/s | best | ratio | drafts a round | accepted by depth, of auto of all |',
    '|---|---|---|---|---|---|---|',
  ];
  for (const contestant of contestants) {
    const { way, drafts, rates } = contestant;
    const base = contestants.find((other) => other.way === way)!;
    const ratio = median(rates.map((rate, round) => rate / base.rates[round]!));
    const drafted = await contestant.drafted();
    const [middle, best] = [median(rates), Math.max(...rates)];
    lines.push(
      `| ${way} | ${drafts} | ${middle.toFixed(0)} | ${best.toFixed(0)} | ${ratio.toFixed(2)} | ${width(drafted)} | ${acceptance(drafts, drafted)} |`,
    );
  }
  process.stdout.write(`${lines.join('\n')}\n`);
}

function median(values: readonly number[]): number {
  return values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)]!;
}
