import { spawn, type ChildProcess } from 'node:child_process';
import { readFileSync } from 'node:fs';
import type { Socket } from 'node:net';
import { fileURLToPath } from 'node:url';
import { TEST_DEVICE } from '../helpers/device.js';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));

/** of every Server */
export const CACHE_MEMORY_MIB = 256;

export interface Exit {
  code: number | null;
  stdout: string;
  stderr: string;
}

/** Runs `rodin ARGS` from source to its end. */
export async function rodin(...args: string[]): Promise<Exit> {
  const { exit } = start(args);
  return exit;
}

function start(args: string[]): {
  child: ChildProcess;
  exit: Promise<Exit>;
  output: { stdout: string; stderr: string };
} {
  const env = Object.fromEntries(Object.entries(process.env).filter(([name]) => !name.startsWith('RODIN_')));
  const child = spawn(process.execPath, ['--import', 'tsx', 'server/main.ts', ...args], {
    cwd: ROOT,
    env,
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  const output = { stdout: '', stderr: '' };
  child.stdout.on('data', (part: Buffer) => (output.stdout += part.toString()));
  child.stderr.on('data', (part: Buffer) => (output.stderr += part.toString()));
  const exit = new Promise<Exit>((resolve) => child.once('close', (code) => resolve({ code, ...output })));
  return { child, exit, output };
}

/**
 * A real server: its own process, the real engine, the bundled model. It does not keep the test's process alive, and
 * dies with it: a test that fails before stop() ends all the same.
 */
export class Server {
  readonly url: string;
  readonly pid: number;
  readonly output: { stdout: string; stderr: string };
  readonly #child: ChildProcess;
  readonly #exit: Promise<Exit>;

  private constructor(url: string, { child, exit, output }: ReturnType<typeof start>) {
    this.url = url;
    this.pid = child.pid!;
    this.output = output;
    this.#child = child;
    this.#exit = exit;
    this.#hold(false);
    const kill = (): boolean => child.kill('SIGKILL');
    process.once('exit', kill);
    void exit.then(() => process.off('exit', kill));
  }

  /** Waits for its end. */
  get exit(): Promise<Exit> {
    this.#hold(true);
    return this.#exit;
  }

  #hold(isHeld: boolean): void {
    for (const handle of [this.#child, this.#child.stdout as Socket, this.#child.stderr as Socket]) {
      if (isHeld) handle.ref();
      else handle.unref();
    }
  }

  static start(...args: string[]): Promise<Server> {
    const cache = ['--cache-memory', `${CACHE_MEMORY_MIB}MiB`];
    return Server.startWith('--device', TEST_DEVICE, '--deterministic', ...cache, ...args);
  }

  /** No device and no cache of the tests' own. */
  static async startWith(...args: string[]): Promise<Server> {
    const started = start(['serve', '--port', '0', ...args]);
    const end = performance.now() + 60_000;
    while (performance.now() < end && started.child.exitCode === null) {
      const url = /Rodin serves .* on (http:\/\/\S+) [\s\S]*Try:/.exec(started.output.stdout)?.[1];
      if (url) return new Server(url, started);
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
    started.child.kill('SIGKILL');
    throw new Error(`the server did not start:\n${started.output.stdout}\n${started.output.stderr}`);
  }

  signal(signal: NodeJS.Signals): void {
    this.#child.kill(signal);
  }

  /** SIGTERM and the exit code */
  async stop(): Promise<number | null> {
    this.signal('SIGTERM');
    return (await this.exit).code;
  }

  chat(body: object, init: RequestInit = {}): Promise<Response> {
    return fetch(`${this.url}/v1/chat/completions`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ model: 'pocket-r1', ...body }),
      ...init,
    });
  }

  async json(body: object): Promise<any> {
    const response = await this.chat(body);
    if (response.status !== 200) throw new Error(`status ${response.status}: ${await response.text()}`);
    return response.json();
  }

  async health(): Promise<any> {
    return (await fetch(`${this.url}/health`)).json();
  }

  /** value of a metric line that begins so */
  async metric(start: string): Promise<number> {
    const text = await (await fetch(`${this.url}/metrics`)).text();
    const line = text.split('\n').find((candidate) => candidate.startsWith(start));
    return line === undefined ? NaN : Number(line.slice(line.lastIndexOf(' ')));
  }

  /** process id of the engine, a child of the server */
  enginePid(): number {
    const children = readFileSync(`/proc/${this.pid}/task/${this.pid}/children`, 'utf8')
      .trim()
      .split(' ')
      .filter(Boolean);
    for (const pid of children) {
      if (readFileSync(`/proc/${pid}/cmdline`, 'utf8').includes('engine/child')) return Number(pid);
    }
    throw new Error(`server ${this.pid} has no engine among its children ${children.join(' ')}`);
  }
}

/** Data of each event of a streamed response, as it comes; [DONE] is left out, `isDone` says whether it came. */
export async function readEvents(
  response: Response,
  onEvent: (event: any) => void = () => {},
): Promise<{ events: any[]; isDone: boolean }> {
  const events: any[] = [];
  let isDone = false;
  let rest = '';
  for await (const part of response.body!.pipeThrough(new TextDecoderStream())) {
    rest += part;
    const blocks = rest.split('\n\n');
    rest = blocks.pop()!;
    for (const block of blocks) {
      const data = /^data: (.*)$/m.exec(block)?.[1];
      if (data === undefined) continue;
      if (data === '[DONE]') isDone = true;
      else {
        events.push(JSON.parse(data));
        onEvent(events.at(-1));
      }
    }
  }
  return { events, isDone };
}

/** Runs jobs over items, at most `width` at once. */
export async function pooled<Item, Result>(
  items: readonly Item[],
  width: number,
  job: (item: Item) => Promise<Result>,
): Promise<Result[]> {
  const results = new Array<Result>(items.length);
  let next = 0;
  const worker = async (): Promise<void> => {
    while (next < items.length) {
      const index = next++;
      results[index] = await job(items[index]!);
    }
  };
  await Promise.all(Array.from({ length: width }, worker));
  return results;
}

export function fixture(name: string): any[] {
  const text = readFileSync(new URL(`../fixtures/pocket-r1-reference/${name}`, import.meta.url), 'utf8');
  return text
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line));
}
