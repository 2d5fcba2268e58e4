/** `rodin doctor`: what this machine has, what Rodin sees of it, and what it would use. */
import { availableParallelism, cpus, freemem, totalmem } from 'node:os';
import type { DoctorConfig } from './config.js';
import { findAddon, type LoadedAddon } from './engine/load-addon.js';
import { chooseDevice } from './engine/device.js';
import { StartupError } from './errors.js';
import { usableCores, usableMemory } from './machine.js';
import { readCheckpoint } from './model/checkpoint.js';
import { sizeText } from './progress.js';

/** One line of the report; not ok: Rodin does not serve like this, and `text` says what to do. */
export interface Finding {
  name: string;
  text: string;
  isOk: boolean;
}

/** Looks at everything that `serve` needs before it loads weights; nothing is allocated or listened on. */
export function examine(config: DoctorConfig, version: string, find: () => LoadedAddon = findAddon): Finding[] {
  const findings: Finding[] = [];
  const tell = (name: string, text: string, isOk = true): void => void findings.push({ name, text, isOk });
  /** The answer; null where there is a sentence for people instead. */
  const ask = <Result>(name: string, question: () => Result): Result | null => {
    try {
      return question();
    } catch (error) {
      if (!(error instanceof StartupError)) throw error;
      tell(name, error.message, false);
      return null;
    }
  };

  tell('rodin', `${version}, Node ${process.versions.node}, ${process.platform}-${process.arch}`);
  const [first] = cpus();
  const [cores, mayUse] = [availableParallelism(), usableCores()];
  tell('processor', `${first?.model.trim() ?? 'unknown'}, ${counted(cores, 'core')}`);
  tell(
    'threads',
    config.threads !== null
      ? `${config.threads}, because --threads says so`
      : `${mayUse}${mayUse < cores ? `, because this process gets the time of ${mayUse} of the cores` : ''}`,
  );
  tell('memory', `${sizeText(usableMemory())} can be used, ${sizeText(freemem())} of ${sizeText(totalmem())} are free`);

  const loaded = ask('addon', find);
  if (loaded !== null) {
    const { addon, path } = loaded;
    tell('addon', path);
    tell('CPU paths', `${addon.cpuPaths().join(', ')}; the first is used`);
    const { usable, unusable } = addon.devices();
    tell('devices', usable.join(', '));
    for (const entry of unusable) tell('not usable', `${entry.device}: ${entry.reason}`);
  }

  const checkpoint = ask('model', () => readCheckpoint(config.model));
  const choice = loaded && ask('device', () => chooseDevice(loaded.addon, config.device, 'auto'));
  if (choice) tell('device', `${choice.device} is used with --device ${config.device}`);
  if (choice?.note !== undefined) tell('note', choice.note);
  if (checkpoint !== null) {
    const { spec, weightBytes, notes } = checkpoint;
    const drafts = spec.numMtpLayers > 0 ? ', drafts tokens with its MTP layer' : '';
    tell('model', `${checkpoint.folder}: ${spec.numHiddenLayers} layers, ${sizeText(weightBytes)} of weights${drafts}`);
    for (const note of notes) tell('note', note);
    if (choice?.device === 'cpu' && weightBytes > usableMemory()) {
      tell('weights', 'more than the memory that can be used: give this process more memory', false);
    }
  }
  return findings;
}

/** The findings as text, and the exit code: 1 where something keeps Rodin from serving. */
export function report(findings: readonly Finding[]): { text: string; code: number } {
  const width = Math.max(...findings.map(({ name }) => name.length));
  const lines = findings.map(({ name, text, isOk }) => `${isOk ? ' ' : '!'} ${name.padEnd(width)}  ${text}`);
  const numBad = findings.filter(({ isOk }) => !isOk).length;
  const verdict = numBad === 0 ? 'Rodin can serve here.' : `${counted(numBad, 'thing')} to put right, marked with !.`;
  return { text: `${lines.join('\n')}\n\n${verdict}`, code: numBad === 0 ? 0 : 1 };
}

function counted(count: number, noun: string): string {
  return `${count} ${noun}${count === 1 ? '' : 's'}`;
}
