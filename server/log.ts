import type { Writable } from 'node:stream';

const LEVELS: Record<number, string> = { 10: 'trace', 20: 'debug', 30: 'info', 40: 'warn', 50: 'error', 60: 'fatal' };

/** Fields that every line has and nobody wants to read. */
const HIDDEN = new Set(['level', 'time', 'pid', 'hostname', 'msg', 'reqId', 'err']);

/** Turns the logger's JSON lines into text for people. */
export function textLog(out: Writable): { write(line: string): void } {
  return {
    write(line) {
      const entry = JSON.parse(line) as Record<string, unknown> & { err?: { stack?: string; message?: string } };
      const time = new Date(entry['time'] as number).toTimeString().slice(0, 8);
      const fields = Object.entries(entry)
        .filter(([key]) => !HIDDEN.has(key))
        .map(([key, value]) => ` ${key}=${typeof value === 'string' ? value : JSON.stringify(value)}`);
      const stack = entry.err ? `\n${entry.err.stack ?? entry.err.message}` : '';
      const message = typeof entry['msg'] === 'string' ? entry['msg'] : '';
      out.write(`${time} ${LEVELS[entry['level'] as number] ?? 'log'} ${message}${fields.join('')}${stack}\n`);
    },
  };
}
