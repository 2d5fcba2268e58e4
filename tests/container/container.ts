/** A container of an image, as an orchestrator starts it: its own mounts and processes, a read-only root, any user. */
import { spawn, spawnSync, type ChildProcess } from 'node:child_process';
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import type { ImageConfig } from './storage.js';

export interface ContainerOptions {
  root: string;
  config: ImageConfig;
  user: string;
  /** host folder -> folder in the container, read-only */
  volumes?: readonly (readonly [from: string, to: string])[];
  env?: readonly string[];
  /** instead of the image's Cmd */
  args?: readonly string[];
}

/**
 * The shell that becomes the container: it makes the root read-only in a mount namespace that ends with it, enters it
 * and gives up every privilege. The first process of the container is the image's entry point.
 */
function script({ root, user, volumes = [] }: ContainerOptions): string {
  const quote = (text: string): string => `'${text.replaceAll("'", "'\\''")}'`;
  const binds = [['/dev', '/dev'], ...volumes].map(
    ([from, to]) => `mount --rbind ${quote(from)} ${quote(join(root, to))}`,
  );
  const readOnly = volumes.map(([, to]) => `mount -o remount,ro,bind ${quote(join(root, to))}`);
  return [
    'set -e',
    `mount --bind ${quote(root)} ${quote(root)}`,
    ...binds,
    `mount -t proc proc ${quote(join(root, 'proc'))}`,
    ...readOnly,
    `mount -o remount,ro,bind ${quote(root)}`,
    `cd ${quote(root)}`,
    `exec chroot --userspec=${quote(user)} --groups= ${quote(root)} /bin/sh -c 'cd "$1" && shift && exec "$@"' sh "$@"`,
  ].join('\n');
}

function commandLine(options: ContainerOptions, words: readonly string[]): string[] {
  const { config, env = [] } = options;
  for (const [, to] of options.volumes ?? []) mkdirSync(join(options.root, to), { recursive: true });
  return [
    ...['--mount', '--pid', '--fork', '--kill-child=SIGKILL', 'sh', '-c', script(options), 'sh', config.WorkingDir],
    ...['env', '-i', ...config.Env, ...env, ...words],
  ];
}

/** Runs a command in a container of its own and returns what it said. */
export function runOnce(options: ContainerOptions, ...words: string[]): { status: number | null; text: string } {
  const { status, stdout, stderr } = spawnSync('unshare', commandLine(options, words), { encoding: 'utf8' });
  return { status, text: stdout + stderr };
}

/** A running container; `output` grows. */
export class Container {
  readonly exit: Promise<number | null>;
  output = '';
  readonly #child: ChildProcess;

  constructor(options: ContainerOptions) {
    const { config, args = config.Cmd } = options;
    this.#child = spawn('unshare', commandLine(options, [...config.Entrypoint, ...args]), {
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    this.#child.stdout!.on('data', (part: Buffer) => (this.output += part.toString()));
    this.#child.stderr!.on('data', (part: Buffer) => (this.output += part.toString()));
    this.exit = new Promise((resolve) => this.#child.once('close', resolve));
  }

  /** Id, on this machine, of the container's first process: the child of the one that made the namespaces. */
  get firstPid(): number {
    const children = spawnSync('ps', ['-o', 'pid=', '--ppid', String(this.#child.pid)], { encoding: 'utf8' }).stdout;
    return Number(children.trim().split('\n')[0]);
  }

  async until(pattern: RegExp, seconds: number): Promise<RegExpExecArray> {
    const end = performance.now() + seconds * 1000;
    while (performance.now() < end && this.#child.exitCode === null) {
      const match = pattern.exec(this.output);
      if (match) return match;
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
    throw new Error(`the container did not say ${pattern}:\n${this.output}`);
  }

  /** SIGTERM to the container's first process, as an orchestrator sends it; the exit code. */
  async stop(): Promise<number | null> {
    process.kill(this.firstPid, 'SIGTERM');
    return this.exit;
  }

  kill(): void {
    this.#child.kill('SIGKILL');
  }
}
