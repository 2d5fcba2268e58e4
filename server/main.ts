#!/usr/bin/env node
/** Entry and command line. */
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { formatOpsReport, runBenchOps } from './bench/ops.js';
import { runBenchStep } from './bench/step.js';
import { formatReport } from './bench/table.js';
import { packageVersion, readCommandLine } from './config.js';
import { examine, report } from './doctor.js';
import { StartupError } from './errors.js';
import { runLogits } from './logits.js';
import { LoadingProgress } from './progress.js';
import { serve } from './serve.js';

async function main(): Promise<number> {
  const command = readCommandLine(process.argv.slice(2), process.env);
  const say = (line: string): boolean => process.stderr.write(`${line}\n`);
  const progress = new LoadingProgress(process.stderr, say);
  const onProgress = (loaded: number, total: number): void => {
    progress.update(loaded, total);
    if (loaded >= total) progress.end();
  };
  switch (command.kind) {
    case 'print':
      process.stdout.write(`${command.text}\n`);
      return 0;
    case 'serve':
      return serve(command.config);
    case 'bench': {
      if (command.what === 'ops') {
        const report = runBenchOps(command.config);
        process.stdout.write(`${command.config.json ? JSON.stringify(report) : formatOpsReport(report)}\n`);
        return 0;
      }
      const report = await runBenchStep(command.config, onProgress);
      progress.end();
      process.stdout.write(`${command.config.json ? JSON.stringify(report) : formatReport(report)}\n`);
      return 0;
    }
    case 'logits': {
      const numPrompts = await runLogits({ ...command.config, onProgress });
      progress.end();
      say(`wrote the logits of ${numPrompts} prompts to ${command.config.out}`);
      return 0;
    }
    case 'doctor': {
      const { text, code } = report(examine(command.config, packageVersion()));
      process.stdout.write(`${text}\n`);
      return code;
    }
    case 'build': {
      const setup = fileURLToPath(new URL('../server/setup.mjs', import.meta.url));
      if (!existsSync(setup))
        throw new StartupError('There are no sources here to build from: an image has its addon.');
      return spawnSync(process.execPath, [setup, '--addon'], { stdio: 'inherit' }).status ?? 1;
    }
  }
}

try {
  process.exit(await main());
} catch (error) {
  const text = error instanceof StartupError ? `rodin: ${error.message}` : ((error as Error).stack ?? String(error));
  process.stderr.write(`${text}\n`, () => process.exit(1));
}
