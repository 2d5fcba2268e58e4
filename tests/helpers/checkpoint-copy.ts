import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

export const FIXTURES = fileURLToPath(new URL('../fixtures', import.meta.url));
export const POCKET_R1 = fileURLToPath(new URL('../../models/pocket-r1', import.meta.url));

export type Header = Record<string, { dtype: string; shape: number[]; data_offsets: number[] }>;

/** A private copy of a checkpoint folder that a test may damage; gone when the test closes it. */
export class CheckpointCopy {
  readonly folder: string;

  constructor(source: string) {
    this.folder = mkdtempSync(join(tmpdir(), 'rodin-checkpoint-'));
    cpSync(source, this.folder, { recursive: true });
  }

  close(): void {
    rmSync(this.folder, { recursive: true, force: true });
  }

  path(file: string): string {
    return join(this.folder, file);
  }

  remove(file: string): void {
    rmSync(this.path(file));
  }

  editJson(file: string, edit: (object: Record<string, unknown>) => void): void {
    const object = JSON.parse(readFileSync(this.path(file), 'utf8')) as Record<string, unknown>;
    edit(object);
    writeFileSync(this.path(file), JSON.stringify(object));
  }

  writeJson(file: string, object: unknown): void {
    writeFileSync(this.path(file), JSON.stringify(object));
  }

  editBytes(file: string, edit: (bytes: Buffer) => Buffer): void {
    writeFileSync(this.path(file), edit(readFileSync(this.path(file))));
  }

  /** Changes one tensor's bytes in place. */
  editTensor(file: string, name: string, edit: (bytes: Buffer) => void): void {
    this.editBytes(file, (bytes) => {
      const data = 8 + Number(bytes.readBigUInt64LE(0));
      const [begin, end] = (JSON.parse(bytes.toString('utf8', 8, data)) as Header)[name]!.data_offsets;
      edit(bytes.subarray(data + begin!, data + end!));
      return bytes;
    });
  }

  /** Rewrites a shard's header; the tensors stay as they are. */
  editHeader(file: string, edit: (header: Header) => Header | void): void {
    this.editHeaderText(file, (text) => {
      const header = JSON.parse(text) as Header;
      return JSON.stringify(edit(header) ?? header);
    });
  }

  editHeaderText(file: string, edit: (text: string) => string): void {
    this.editBytes(file, (bytes) => {
      const length = Number(bytes.readBigUInt64LE(0));
      const header = Buffer.from(edit(bytes.subarray(8, 8 + length).toString('utf8')));
      const prefix = Buffer.alloc(8);
      prefix.writeBigUInt64LE(BigInt(header.length));
      return Buffer.concat([prefix, header, bytes.subarray(8 + length)]);
    });
  }
}
