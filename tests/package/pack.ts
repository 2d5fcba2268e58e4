import { spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

export const ROOT = fileURLToPath(new URL('../..', import.meta.url));

export interface Outcome {
  status: number | null;
  stdout: string;
  stderr: string;
}

export function run(folder: string, command: string, args: readonly string[], env = process.env): Outcome {
  const { status, stdout, stderr, error } = spawnSync(command, args, { cwd: folder, env, encoding: 'utf8' });
  if (error) throw error;
  return { status, stdout, stderr };
}

/** npm, with nothing of the npm that may have started this. */
export function npm(folder: string, ...args: string[]): Outcome {
  const env = Object.fromEntries(Object.entries(process.env).filter(([name]) => !name.startsWith('npm_')));
  return run(folder, 'npm', args, env);
}

/** A temporary folder of one's own, for as long as the job takes. */
export async function inFolder(job: (folder: string) => Promise<void> | void): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), 'rodin-package-'));
  try {
    await job(folder);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

interface Packed {
  filename: string;
  files: { path: string }[];
}

/** Packs this project, with the addon that is built, into the folder; returns the archive and the files in it. */
export function pack(folder: string, ...flags: string[]): { archive: string; files: string[] } {
  mkdirSync(folder, { recursive: true });
  const { status, stdout, stderr } = npm(ROOT, 'pack', '--json', '--pack-destination', folder, ...flags);
  if (status !== 0) throw new Error(`npm pack failed:\n${stderr}`);
  // A list up to npm 11, an object by package name from npm 12 on.
  const packed = JSON.parse(stdout.slice(stdout.search(/^[[{]/m))) as Record<string, Packed> | Packed[];
  const [{ filename, files }] = Object.values(packed) as [Packed];
  return { archive: join(folder, filename), files: files.map(({ path }) => path) };
}
