//! Damages files, knowing their formats: what is damaged at random alone fails at the first check of a reader.
//!
//! The same seed and number give the same damage, on every machine.

use serde_json::{Map, Value, json};

/// SplitMix64: small, and the same everywhere.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64, number: u64) -> Self {
        let mut mixed = Self(seed);
        Self(mixed.number() ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to `n` - 1; 0 when `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.number() % n.max(1) as u64) as usize
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    /// A part of `0..len`, mostly short.
    fn range(&mut self, len: usize) -> std::ops::Range<usize> {
        let begin = self.below(len + 1);
        let most = if self.one_in(4) { len } else { 16 };
        begin..len.min(begin + self.below(most + 1))
    }
}

/// What a file is, by its name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Json,
    JsonLines,
    Text,
    Jinja,
    Safetensors,
    Arrow,
    Parquet,
    Gguf,
}

impl Kind {
    pub fn of(name: &str) -> Self {
        match name.rsplit('.').next().unwrap_or_default() {
            "json" | "ipynb" => Self::Json,
            "jsonl" => Self::JsonLines,
            "jinja" => Self::Jinja,
            "safetensors" => Self::Safetensors,
            "arrow" => Self::Arrow,
            "parquet" => Self::Parquet,
            "gguf" => Self::Gguf,
            _ => Self::Text,
        }
    }
}

/// No input grows beyond this: what a reader does with large files is not asked here.
const LARGEST: usize = 256 << 10;

/// Changes a file once; `other` is a good file of the same kind, to take pieces from.
pub fn mutate(random: &mut Random, kind: Kind, bytes: &mut Vec<u8>, other: &[u8]) {
    match kind {
        Kind::Json => json_text(random, bytes, other),
        Kind::JsonLines => json_lines(random, bytes, other),
        Kind::Text => text(random, bytes, other),
        Kind::Jinja => jinja(random, bytes, other),
        Kind::Safetensors => safetensors(random, bytes, other),
        Kind::Arrow => binary(random, bytes, other, &arrow_fields(bytes)),
        Kind::Parquet => parquet(random, bytes, other),
        Kind::Gguf => gguf(random, bytes, other),
    }
    bytes.truncate(LARGEST);
}

// Bytes.

const NUMBERS: [u64; 17] = [
    0,
    1,
    2,
    7,
    0x7f,
    0xff,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 32,
    1 << 40,
    1 << 62,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

/// A field of a header: where it begins, and its bytes.
type Field = (usize, usize);

fn overwrite(random: &mut Random, bytes: &mut [u8], (at, width): Field) {
    let Some(field) = bytes.get_mut(at..at + width) else { return };
    let mut old = [0; 8];
    old[..width].copy_from_slice(field);
    let old = u64::from_le_bytes(old);
    let new = match random.below(6) {
        0 => old.wrapping_add(1),
        1 => old.wrapping_sub(1),
        2 => old ^ 1 << random.below(8 * width),
        3 => old.wrapping_mul(2),
        4 => random.below(64) as u64,
        _ => *random.pick(&NUMBERS),
    };
    field.copy_from_slice(&new.to_le_bytes()[..width]);
}

fn raw(random: &mut Random, bytes: &mut Vec<u8>, other: &[u8]) {
    let len = bytes.len();
    match random.below(8) {
        0 if len > 0 => {
            let at = random.below(len);
            bytes[at] ^= 1 << random.below(8);
        }
        1 if len > 0 => {
            let at = random.below(len);
            bytes[at] = random.number() as u8;
        }
        2 => bytes.truncate(random.below(len + 1)),
        3 => drop(bytes.drain(random.range(len))),
        4 => {
            let piece = bytes[random.range(len)].to_vec();
            let times = if random.one_in(8) { 1 + random.below(1 << 12) } else { 1 + random.below(3) };
            let piece = piece.repeat(times.min(1 + (LARGEST >> 2) / piece.len().max(1)));
            insert(random, bytes, &piece);
        }
        5 => {
            let piece = other[random.range(other.len())].to_vec();
            insert(random, bytes, &piece);
        }
        6 => {
            // The beginning of one, the end of the other.
            let (cut, from) = (random.below(len + 1), random.below(other.len() + 1));
            bytes.truncate(cut);
            bytes.extend_from_slice(&other[from..]);
        }
        _ => {
            let width = *random.pick(&[1, 2, 4, 8]);
            let at = random.below(len);
            overwrite(random, bytes, (at, width));
        }
    }
}

fn insert(random: &mut Random, bytes: &mut Vec<u8>, piece: &[u8]) {
    let at = random.below(bytes.len() + 1);
    drop(bytes.splice(at..at, piece.iter().copied()));
}

/// Changes a field of a header, most of the time.
fn binary(random: &mut Random, bytes: &mut Vec<u8>, other: &[u8], fields: &[Field]) {
    if fields.is_empty() || random.one_in(5) {
        return raw(random, bytes, other);
    }
    for _ in 0..=random.below(2) {
        let field = *random.pick(fields);
        overwrite(random, bytes, field);
    }
}

fn word(bytes: &[u8], at: usize, width: usize) -> Option<u64> {
    let mut word = [0; 8];
    word[..width].copy_from_slice(bytes.get(at..at.checked_add(width)?)?);
    Some(u64::from_le_bytes(word))
}

// Text.

const PIECES: [&str; 40] = [
    "\"",
    "\"\"",
    "'",
    ",",
    ";",
    "\n",
    "\r\n",
    "\r",
    "\t",
    "\0",
    "\u{feff}",
    "é",
    "诗",
    "🦀",
    "\u{202e}",
    "\\",
    "\\u0000",
    "\\ud800",
    "\\ud83e\\udd80",
    "null",
    "true",
    "NaN",
    "Infinity",
    "-",
    "0",
    "-0",
    "1e400",
    "-1e-400",
    "1.",
    "00",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551616",
    "2024-02-30T25:00:00",
    "[",
    "]",
    "{",
    "}",
    ":",
    "/*",
];

fn text(random: &mut Random, bytes: &mut Vec<u8>, other: &[u8]) {
    match random.below(3) {
        0 => raw(random, bytes, other),
        1 => {
            let piece = random.pick(&PIECES).repeat(if random.one_in(16) { 1 + random.below(5000) } else { 1 });
            insert(random, bytes, piece.as_bytes());
        }
        _ => {
            // A cell, a word or a number becomes something else.
            let ends = |b: &u8| b" ,;\n\":[]{}".contains(b);
            let begin = random.below(bytes.len());
            let end = bytes.iter().skip(begin).position(ends).map_or(bytes.len(), |n| begin + n);
            let piece = random.pick(&PIECES).as_bytes();
            drop(bytes.splice(begin..end, piece.iter().copied()));
        }
    }
}

// JSON.

fn json_text(random: &mut Random, bytes: &mut Vec<u8>, other: &[u8]) {
    let parsed = serde_json::from_slice::<Value>(bytes);
    let (Ok(mut value), false) = (parsed, random.one_in(8)) else { return text(random, bytes, other) };
    let other = serde_json::from_slice(other).unwrap_or(Value::Null);
    json_value(random, &mut value, &other);
    *bytes = value.to_string().into_bytes();
}

fn json_lines(random: &mut Random, bytes: &mut Vec<u8>, other: &[u8]) {
    if random.one_in(4) {
        return text(random, bytes, other);
    }
    let mut lines: Vec<Vec<u8>> = bytes.split(|b| *b == b'\n').map(<[u8]>::to_vec).collect();
    let i = random.below(lines.len());
    match random.below(6) {
        0 => lines.insert(i, lines[i].clone()),
        1 => drop(lines.remove(i)),
        _ => json_text(random, &mut lines[i], other),
    }
    *bytes = lines.join(&b'\n');
}

fn scalar(random: &mut Random) -> Value {
    match random.below(30) {
        0 => Value::Null,
        1 => true.into(),
        2 => false.into(),
        3 => (-1).into(),
        4 => i64::MIN.into(),
        5 => i64::MAX.into(),
        6 => 1e308.into(),
        7 => (-1e308).into(),
        8 => 5e-324.into(),
        9 => (-0.0).into(),
        10 => 0.5.into(),
        11 => 1e18.into(),
        12 => "".into(),
        13 => "a".into(),
        14 => "\0".into(),
        15 => "é诗🦀".into(),
        16 => "../../x".into(),
        17 => "/etc/passwd".into(),
        18 => "x".repeat(1 << random.below(15)).into(),
        19 => json!([]),
        20 => json!({}),
        21 => "(((((a*)*)*)*)*)*b".into(),
        22 => (random.number() as i32).into(),
        23 => random.below(16).into(),
        _ => (*random.pick(&NUMBERS)).into(),
    }
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(fields) => fields.values().map(count).sum(),
        _ => 0,
    }
}

/// The `n`th value inside, itself being the first.
fn nth<'a>(value: &'a mut Value, n: &mut usize) -> Option<&'a mut Value> {
    if *n == 0 {
        return Some(value);
    }
    *n -= 1;
    match value {
        Value::Array(items) => items.iter_mut().find_map(|item| nth(item, n)),
        Value::Object(fields) => fields.values_mut().find_map(|field| nth(field, n)),
        _ => None,
    }
}

/// Changes one value somewhere inside.
pub fn json_value(random: &mut Random, value: &mut Value, other: &Value) {
    let mut n = random.below(count(value));
    // A list of thousands of numbers would leave nothing for its neighbours.
    if random.one_in(2) {
        n = n.min(random.below(64));
    }
    let Some(target) = nth(value, &mut n) else { return };
    match random.below(10) {
        0 => {
            let mut other = other.clone();
            let mut n = random.below(count(&other));
            *target = nth(&mut other, &mut n).map(Value::take).unwrap_or_default();
        }
        1 => {
            for _ in 0..1 << random.below(8) {
                *target = if random.one_in(2) { json!([target.take()]) } else { json!({ "a": target.take() }) };
            }
        }
        2 => retype(random, target),
        3..6 => change(random, target, other),
        _ => *target = scalar(random),
    }
}

/// The same in another type, as other programs may write it.
fn retype(random: &mut Random, target: &mut Value) {
    *target = match target.take() {
        Value::Null => json!(0),
        Value::Bool(b) => i32::from(b).into(),
        Value::Number(n) if random.one_in(2) => n.to_string().into(),
        Value::Number(n) => n.as_f64().unwrap_or_default().into(),
        Value::String(s) => s.chars().map(|c| json!(c.to_string())).collect(),
        Value::Array(items) => items.into_iter().enumerate().map(|(i, v)| (i.to_string(), v)).collect(),
        Value::Object(fields) => fields.into_iter().map(|(_, v)| v).collect(),
    };
}

/// Less, more or other content.
fn change(random: &mut Random, target: &mut Value, other: &Value) {
    match target {
        Value::Array(items) => {
            let i = random.below(items.len());
            match random.below(5) {
                0 if !items.is_empty() => drop(items.remove(i)),
                1 if !items.is_empty() => items.insert(i, items[i].clone()),
                2 if !items.is_empty() => {
                    let times = 1 << random.below(12);
                    let item = items[i].clone();
                    if item.is_number() || item.is_boolean() || item.is_null() {
                        items.extend(vec![item; times]);
                    }
                }
                3 => items.truncate(i),
                _ => items.push(scalar(random)),
            }
        }
        Value::Object(fields) => {
            let keys: Vec<String> = fields.keys().cloned().collect();
            let key = if keys.is_empty() { "a".into() } else { random.pick(&keys).clone() };
            match random.below(5) {
                0 | 1 => drop(fields.remove(&key)),
                2 => {
                    let value = fields.remove(&key).unwrap_or_default();
                    fields.insert(format!("{key}{}", random.pick(&PIECES)), value);
                }
                3 => {
                    // Another's field, or its own under another's name.
                    let Some((name, value)) = other.as_object().and_then(|o| o.iter().nth(random.below(o.len())))
                    else {
                        return;
                    };
                    fields.insert(name.clone(), value.clone());
                }
                _ => {
                    let value = fields.values().nth(random.below(keys.len())).cloned().unwrap_or_default();
                    fields.insert(key, value);
                }
            }
        }
        Value::Number(n) => {
            let n = n.as_i64().unwrap_or(1);
            *target = match random.below(4) {
                0 => n.wrapping_add(1).into(),
                1 => n.wrapping_sub(1).into(),
                2 => n.wrapping_neg().into(),
                _ => n.wrapping_mul(1 << random.below(40)).into(),
            };
        }
        Value::String(s) => {
            let at = s.char_indices().map(|(i, _)| i).nth(random.below(s.chars().count())).unwrap_or(0);
            match random.below(3) {
                0 => s.truncate(at),
                _ => s.insert_str(at, &random.pick(&PIECES).repeat(1 << random.below(6))),
            }
        }
        other => *other = scalar(random),
    }
}

// safetensors: 8 bytes of length, a JSON header, data.

struct Entry {
    name: String,
    dtype: String,
    shape: Vec<u64>,
    bytes: Vec<u8>,
}

const DTYPES: [(&str, usize); 9] =
    [("F32", 4), ("F16", 2), ("BF16", 2), ("U8", 1), ("I8", 1), ("F64", 8), ("I64", 8), ("U32", 4), ("BOOL", 1)];

fn split(bytes: &[u8]) -> Option<(Map<String, Value>, &[u8])> {
    let end = 8usize.checked_add(word(bytes, 0, 8)? as usize)?;
    Some((serde_json::from_slice(bytes.get(8..end)?).ok()?, &bytes[end..]))
}

fn entries(bytes: &[u8]) -> Option<Vec<Entry>> {
    let (header, data) = split(bytes)?;
    let entry = |(name, info): (&String, &Value)| {
        let (begin, end) = (info["data_offsets"][0].as_u64()?, info["data_offsets"][1].as_u64()?);
        Some(Entry {
            name: name.clone(),
            dtype: info["dtype"].as_str()?.into(),
            shape: info["shape"].as_array()?.iter().map(Value::as_u64).collect::<Option<_>>()?,
            bytes: data.get(begin as usize..end as usize)?.to_vec(),
        })
    };
    header.iter().filter(|(name, _)| *name != "__metadata__").map(entry).collect()
}

fn joined(header: &Value, data: &[u8]) -> Vec<u8> {
    let header = header.to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn safetensors(random: &mut Random, bytes: &mut Vec<u8>, other: &[u8]) {
    match random.below(8) {
        0 => raw(random, bytes, other),
        1 => overwrite(random, bytes, (0, 8)),
        2 | 3 => {
            let Some((header, data)) = split(bytes) else { return raw(random, bytes, other) };
            let mut header = Value::Object(header);
            let other = split(other).map(|(header, _)| Value::Object(header)).unwrap_or_default();
            json_value(random, &mut header, &other);
            *bytes = joined(&header, data);
        }
        _ => {
            let Some(mut list) = entries(bytes).filter(|list| !list.is_empty()) else {
                return raw(random, bytes, other);
            };
            change_tensor(random, &mut list, entries(other).unwrap_or_default());
            let (mut header, mut data) = (Map::new(), Vec::new());
            for entry in list {
                let begin = data.len();
                data.extend(entry.bytes);
                let info = json!({ "dtype": entry.dtype, "shape": entry.shape, "data_offsets": [begin, data.len()] });
                header.insert(entry.name, info);
            }
            *bytes = joined(&header.into(), &data);
        }
    }
}

/// A change after which the header and the data still fit together, mostly.
fn change_tensor(random: &mut Random, list: &mut Vec<Entry>, other: Vec<Entry>) {
    let i = random.below(list.len());
    if random.one_in(8) {
        drop(list.remove(i));
        return;
    }
    if let (true, Some(entry)) = (random.one_in(8), other.into_iter().nth(i)) {
        list[i].bytes = entry.bytes;
        return;
    }
    let name = random.pick(list).name.clone();
    let entry = &mut list[i];
    match random.below(6) {
        // The state of a 4-bit weight is JSON.
        0 | 1 if entry.bytes.starts_with(b"{") => {
            json_text(random, &mut entry.bytes, b"{}");
            entry.shape = vec![entry.bytes.len() as u64];
        }
        0 => entry.name = name,
        1 => entry.name.push_str(PIECES[random.below(PIECES.len())]),
        2 => {
            let (dtype, width) = *random.pick(&DTYPES);
            entry.dtype = dtype.into();
            entry.bytes.resize(bytes_of(&entry.shape, width), 0);
        }
        3 => {
            let width = DTYPES.iter().find(|(name, _)| *name == entry.dtype).map_or(1, |(_, width)| *width);
            match random.below(4) {
                0 => entry.shape.reverse(),
                1 => entry.shape.push(random.below(3) as u64),
                2 => entry.shape = (0..random.below(4)).map(|_| *random.pick(&NUMBERS)).collect(),
                _ => entry.shape.iter_mut().for_each(|n| *n = random.below(2 + *n as usize) as u64),
            }
            entry.bytes.resize(bytes_of(&entry.shape, width), 0);
        }
        _ => {
            let value = *random.pick(&[f32::NAN, f32::INFINITY, -1.0, 1e30, -1e30, 1e-30, 65504.0]);
            let at = random.below(entry.bytes.len() / 4) * 4;
            if let Some(place) = entry.bytes.get_mut(at..at + 4) {
                place.copy_from_slice(&value.to_le_bytes());
            }
        }
    }
}

/// As many as the shape needs, also where its product overflows; of a large one the rest is not there.
fn bytes_of(shape: &[u64], width: usize) -> usize {
    shape.iter().fold(width, |n, d| n.wrapping_mul(*d as usize)) % LARGEST
}

// Arrow streams: messages of a mark, a length, a flatbuffer and a body.

/// The words of all flatbuffers, and those at the beginning of bodies, which are offsets of lists and texts.
fn arrow_fields(bytes: &[u8]) -> Vec<Field> {
    let mut fields = Vec::new();
    let mut at = 0;
    while word(bytes, at, 4) == Some(u64::from(u32::MAX)) {
        let length = word(bytes, at + 4, 4).unwrap_or(0) as usize;
        if length == 0 || length > bytes.len() {
            break;
        }
        fields.push((at + 4, 4));
        let begin = at + 8;
        fields.extend((begin..begin + length).step_by(4).map(|at| (at, 4)));
        fields.extend((begin..begin + length).step_by(8).map(|at| (at, 8)));
        fields.extend((begin..begin + length).step_by(2).map(|at| (at, 2)));
        at = begin + length;
        // The body's length is in the flatbuffer, which is not read here: the next mark ends it.
        let mark = |at: &usize| word(bytes, *at, 4) == Some(u64::from(u32::MAX));
        let next = (at..bytes.len()).step_by(8).find(mark).unwrap_or(bytes.len());
        fields.extend((at..next).step_by(4).map(|at| (at, 4)));
        at = next;
    }
    fields
}

// Parquet: pages, then a footer in compact thrift, its length, "PAR1".

fn parquet(random: &mut Random, bytes: &mut Vec<u8>, other: &[u8]) {
    let len = bytes.len();
    let footer = len.checked_sub(8).and_then(|at| word(bytes, at, 4)).unwrap_or(0) as usize;
    if footer == 0 || footer + 8 > len || random.one_in(6) {
        return raw(random, bytes, other);
    }
    let begin = len - 8 - footer;
    match random.below(6) {
        0 => overwrite(random, bytes, (len - 8, 4)),
        1 => {
            // Bytes more or less, and the length tells it.
            let mut inside = bytes[begin..len - 8].to_vec();
            raw(random, &mut inside, &[]);
            let length = (inside.len() as u32).to_le_bytes();
            bytes.truncate(begin);
            bytes.extend([&inside[..], &length, b"PAR1"].concat());
        }
        // Headers of pages, and what they hold.
        2 => {
            let at = 4 + random.below(begin.saturating_sub(4));
            overwrite(random, bytes, (at, 1));
        }
        _ => {
            let at = begin + random.below(footer);
            overwrite(random, bytes, (at, 1));
        }
    }
}

// GGUF: counts, key-value pairs, descriptions of tensors, data.

/// The integers of the header: counts, lengths, types, values, dimensions, offsets.
fn gguf_fields(bytes: &[u8]) -> Vec<Field> {
    let mut fields = vec![(4, 4), (8, 8), (16, 8)];
    let mut at = 24;
    let walked = (|| {
        for _ in 0..word(bytes, 16, 8)?.min(1000) {
            skip_text(bytes, &mut at, &mut fields)?;
            fields.push((at, 4));
            let kind = word(bytes, at, 4)?;
            at += 4;
            skip_value(bytes, kind, &mut at, &mut fields)?;
        }
        for _ in 0..word(bytes, 8, 8)?.min(1000) {
            skip_text(bytes, &mut at, &mut fields)?;
            let dimensions = word(bytes, at, 4)?.min(8) as usize;
            fields.push((at, 4));
            fields.extend((0..dimensions).map(|i| (at + 4 + 8 * i, 8)));
            at += 4 + 8 * dimensions;
            fields.extend([(at, 4), (at + 4, 8)]);
            at += 12;
        }
        Some(())
    })();
    // A damaged file is damaged more where it can still be followed.
    let _ = walked;
    fields
}

fn skip_text(bytes: &[u8], at: &mut usize, fields: &mut Vec<Field>) -> Option<()> {
    fields.push((*at, 8));
    let length = word(bytes, *at, 8)? as usize;
    *at = at.checked_add(8)?.checked_add(length).filter(|at| *at <= bytes.len())?;
    Some(())
}

fn skip_value(bytes: &[u8], kind: u64, at: &mut usize, fields: &mut Vec<Field>) -> Option<()> {
    let width = match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        10..=12 => 8,
        8 => return skip_text(bytes, at, fields),
        9 => {
            fields.extend([(*at, 4), (*at + 4, 8)]);
            let (kind, n) = (word(bytes, *at, 4)?, word(bytes, *at + 4, 8)?);
            *at += 12;
            let before = fields.len();
            (0..n.min(100_000)).try_for_each(|_| skip_value(bytes, kind, at, fields))?;
            // A few of thousands of tokens.
            fields.truncate(before + 8);
            return Some(());
        }
        _ => return None,
    };
    fields.push((*at, width));
    *at += width;
    Some(())
}

fn gguf(random: &mut Random, bytes: &mut Vec<u8>, other: &[u8]) {
    let fields = gguf_fields(bytes);
    if random.one_in(4) {
        // Letters of keys, names and tokens.
        let end = fields.last().map_or(24, |(at, _)| *at).min(bytes.len());
        if end > 24 {
            let at = 24 + random.below(end - 24);
            bytes[at] = if random.one_in(3) { random.number() as u8 } else { bytes[random.below(end)] };
        }
        return;
    }
    binary(random, bytes, other, &fields);
}

// Jinja: a template takes a statement or an expression more, made from parts that are each allowed.

fn jinja(random: &mut Random, bytes: &mut Vec<u8>, other: &[u8]) {
    if random.one_in(8) {
        return text(random, bytes, other);
    }
    let mut source = String::from_utf8_lossy(bytes).into_owned();
    let piece = statement(random, 3);
    if random.one_in(4) {
        source = piece;
    } else {
        // Between two of its own pieces; inside one now and then.
        let ends: Vec<usize> = source.match_indices("%}").map(|(at, _)| at + 2).collect();
        let end = if ends.is_empty() { source.len() } else { *random.pick(&ends) };
        let inside: Vec<usize> = source.char_indices().map(|(at, _)| at).collect();
        let at = if random.one_in(8) && !inside.is_empty() { *random.pick(&inside) } else { end };
        source.insert_str(at, &piece);
    }
    *bytes = source.into_bytes();
}

fn statement(random: &mut Random, depth: usize) -> String {
    if depth == 0 {
        return format!("{{{{ {} }}}}", expression(random, 1));
    }
    let e = expression(random, depth - 1);
    let body: String = (0..=random.below(2)).map(|_| statement(random, depth - 1)).collect();
    match random.below(14) {
        0 | 1 => format!("{{% for x in {e} %}}{body}{{% endfor %}}"),
        2 => format!("{{% for x in {e} recursive %}}{body}{{{{ loop([x, x]) }}}}{{% endfor %}}"),
        3 => format!("{{% if {e} %}}{body}{{% else %}}{body}{{% endif %}}"),
        4 => format!("{{% set x = {e} %}}{body}"),
        5 => format!("{{% set ns.x = {e} %}}"),
        6 => format!("{{% set x %}}{body}{{% endset %}}{{{{ x }}}}"),
        7 => format!("{{% macro f(a, b=2) %}}{body}{{{{ f(a) }}}}{{% endmacro %}}{{{{ f({e}) }}}}"),
        8 => {
            format!("{{% macro f(a) %}}{{{{ caller(a) }}}}{{% endmacro %}}{{% call(u) f({e}) %}}{body}{{% endcall %}}")
        }
        9 => format!("{{% filter {} %}}{body}{{% endfilter %}}", filter(random, depth - 1)),
        10 => format!("{{% with x = {e} %}}{body}{{% endwith %}}"),
        11 => {
            format!("{{% for k, v in {e} %}}{{% if k %}}{{% break %}}{{% endif %}}{body}{{% else %}}{e}{{% endfor %}}")
        }
        12 => format!("{{% generation %}}{body}{{% endgeneration %}}{{% include \"chat_template\" %}}"),
        _ => format!("{{{{ {e} }}}}"),
    }
}

const HUGE: [&str; 16] = [
    "0",
    "1",
    "-1",
    "7",
    "99999",
    "100000",
    "1000000000",
    "2147483648",
    "4611686018427387904",
    "9223372036854775807",
    "-9223372036854775808",
    "18446744073709551615",
    "1e308",
    "0.0",
    "1.5",
    "340282366920938463463374607431768211455",
];

const ATOMS: [&str; 26] = [
    "messages",
    "messages[0]",
    "messages[0].content",
    "messages[-1]['role']",
    "messages[1:]",
    "x",
    "ns.x",
    "loop.index",
    "loop",
    "bos_token",
    "add_generation_prompt",
    "tools",
    "none",
    "true",
    "'user'",
    "'诗🦀 a b'",
    "''",
    "'%Y-%m-%d'",
    "'%'",
    "[]",
    "{}",
    "{'a': 1, 'b': [1, 2]}",
    "namespace(x=0)",
    "self",
    "undefined_name",
    "f",
];

fn expression(random: &mut Random, depth: usize) -> String {
    if depth == 0 || random.one_in(4) {
        return if random.one_in(3) { random.pick(&HUGE).to_string() } else { random.pick(&ATOMS).to_string() };
    }
    let (a, b) = (expression(random, depth - 1), expression(random, depth - 1));
    match random.below(16) {
        0 => format!("range({a})"),
        1 => format!("range({}, {}, {})", random.pick(&HUGE), random.pick(&HUGE), random.pick(&HUGE)),
        2 => format!("({a} {} {b})", random.pick(&["+", "-", "*", "/", "//", "%", "**", "~"])),
        3 => format!("({a} {} {b})", random.pick(&["==", "<", "in", "not in", "and", "or", ">="])),
        4 => format!("({a} if {b} else {a})"),
        5 => format!("({a})[{b}]"),
        6 => format!("({a})[{}:{}:{}]", random.pick(&HUGE), random.pick(&HUGE), random.pick(&HUGE)),
        7 => {
            format!("({a} is {})", random.pick(&["defined", "none", "string", "mapping", "iterable", "divisibleby(0)"]))
        }
        8 => format!("[{a}, {b}]"),
        9 => format!("dict(a={a}, b={b})"),
        10 => format!("strftime_now({a})"),
        11 => format!("({a}).{}", method(random, &b)),
        12 => {
            format!("{}({a})", random.pick(&["raise_exception", "dict", "namespace", "debug", "lipsum", "cycler", "f"]))
        }
        13 => format!("-({a})"),
        _ => format!("({a}|{})", filter(random, depth - 1)),
    }
}

fn filter(random: &mut Random, depth: usize) -> String {
    const PLAIN: [&str; 34] = [
        "trim",
        "upper",
        "length",
        "list",
        "first",
        "last",
        "reverse",
        "sort",
        "unique",
        "join",
        "tojson",
        "string",
        "int",
        "float",
        "abs",
        "round",
        "escape",
        "safe",
        "title",
        "capitalize",
        "lower",
        "items",
        "dictsort",
        "sum",
        "min",
        "max",
        "lines",
        "pprint",
        "bool",
        "urlencode",
        "chain",
        "zip",
        "keys",
        "values",
    ];
    let n = *random.pick(&HUGE);
    match random.below(14) {
        0 => format!("tojson(indent={n})"),
        1 => format!("indent({n})"),
        2 => format!("indent({n}, true, true)"),
        3 => format!("batch({n})"),
        4 => format!("slice({n})"),
        5 => format!("batch({n}, 'x')"),
        6 => format!("round({n})"),
        7 => format!("replace('', {})", expression(random, depth)),
        8 => format!("join({})", expression(random, depth)),
        9 => format!("default({})", expression(random, depth)),
        10 => format!("map(attribute={})", random.pick(&["'content'", "'role'", "0"])),
        11 => format!("selectattr('role', 'equalto', {})", expression(random, depth)),
        12 => format!("int(default={n})"),
        _ => random.pick(&PLAIN).to_string(),
    }
}

fn method(random: &mut Random, argument: &str) -> String {
    const TAKE_ONE: [&str; 16] = [
        "split",
        "strip",
        "lstrip",
        "rstrip",
        "startswith",
        "endswith",
        "join",
        "count",
        "find",
        "rfind",
        "get",
        "append",
        "splitlines",
        "title",
        "format",
        "extend",
    ];
    let n = random.pick(&HUGE);
    match random.below(6) {
        0 => format!("replace({argument}, 'xx')"),
        1 => format!("split({argument}, {n})"),
        2 => format!("replace('', {argument}, {n})"),
        3 => format!("{}()", random.pick(&["items", "keys", "values", "upper", "lower", "isdigit", "strip", "split"])),
        _ => format!("{}({argument})", random.pick(&TAKE_ONE)),
    }
}
