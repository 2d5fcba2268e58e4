import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { fileURLToPath } from 'node:url';
import { StartupError } from '../errors.js';
import type { NativeAddon } from './addon.js';

/** Root of this package; the path is the same from server/engine and from dist/engine. */
const ROOT = new URL('../../', import.meta.url);

/** What this machine built. */
export const ADDON_PATH = fileURLToPath(new URL('build/rodin.node', ROOT));

/** What a published package carries for this platform. */
export const PREBUILT_PATH = fileURLToPath(new URL(`prebuilds/${process.platform}-${process.arch}/rodin.node`, ROOT));

export interface LoadedAddon {
  addon: NativeAddon;
  path: string;
}

/** The addon that was built here, or else the one that came with the package. Throws StartupError. */
export function findAddon(paths: readonly string[] = [ADDON_PATH, PREBUILT_PATH]): LoadedAddon {
  const found = paths.filter((path) => existsSync(path));
  const advice = 'run `npx rodin build`, or `npm run build` in a clone, to build it here';
  if (found.length === 0) {
    throw new StartupError(`The native addon is missing (neither ${paths.join(' nor ')} exists): ${advice}.`);
  }
  const problems: string[] = [];
  for (const path of found) {
    try {
      return { addon: createRequire(import.meta.url)(path) as NativeAddon, path };
    } catch (error) {
      problems.push(`${path} cannot be loaded: ${(error as Error).message}`);
    }
  }
  throw new StartupError(`${problems.join('; ')}: ${advice}.`);
}

export function loadAddon(): NativeAddon {
  return findAddon().addon;
}
