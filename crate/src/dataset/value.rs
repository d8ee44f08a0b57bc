//! One cell of a dataset, and the way between cells and Arrow columns.

use std::{fmt, sync::Arc};

use arrow_array::{
    Array, ArrayRef, BooleanArray, Float64Array, Int64Array, ListArray, NullArray, StringArray, StructArray,
    cast::AsArray,
    types::{Float64Type, Int64Type, UInt64Type},
};
use arrow_buffer::{NullBuffer, OffsetBuffer};
use arrow_cast::{cast, display::array_value_to_string};
use arrow_schema::{DataType, Field, Fields};

use crate::py_repr::{commas, py_bool, py_dict, py_float, py_str};

/// The value of one column in one row.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Value {
    #[default]
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    List(Vec<Value>),
    Struct(Vec<(String, Value)>),
}

impl Value {
    /// The type's name as `datasets` writes it.
    pub fn type_name(&self) -> &'static str {
        match self {
            Value::Null => "null",
            Value::Bool(_) => "bool",
            Value::Int(_) => "int64",
            Value::Float(_) => "float64",
            Value::Text(_) => "string",
            Value::List(_) => "list",
            Value::Struct(_) => "struct",
        }
    }

    pub(super) fn as_bool(&self) -> Option<bool> {
        if let Value::Bool(b) = self { Some(*b) } else { None }
    }

    pub(super) fn as_int(&self) -> Option<i64> {
        if let Value::Int(i) = self { Some(*i) } else { None }
    }

    /// Of a float or an integer.
    pub(super) fn as_float(&self) -> Option<f64> {
        if let Value::Float(x) = self { Some(*x) } else { self.as_int().map(|i| i as f64) }
    }

    fn as_text(&self) -> Option<&str> {
        if let Value::Text(text) = self { Some(text) } else { None }
    }

    fn as_list(&self) -> &[Value] {
        if let Value::List(items) = self { items } else { &[] }
    }

    /// The value of a struct's field.
    fn field(&self, name: &str) -> &Value {
        match self {
            Value::Struct(fields) => fields.iter().find(|(n, _)| n == name).map_or(&Value::Null, |(_, v)| v),
            _ => &Value::Null,
        }
    }
}

/// As Python's `repr` prints it.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Null => f.write_str("None"),
            Value::Bool(b) => f.write_str(py_bool(*b)),
            Value::Int(i) => write!(f, "{i}"),
            Value::Float(x) => f.write_str(&py_float(*x)),
            Value::Text(s) => f.write_str(&py_str(s)),
            Value::List(items) => write!(f, "[{}]", commas(items)),
            Value::Struct(fields) => f.write_str(&py_dict(fields.iter().map(|(name, value)| (name, value)))),
        }
    }
}

impl From<serde_json::Value> for Value {
    fn from(json: serde_json::Value) -> Self {
        match json {
            serde_json::Value::Null => Value::Null,
            serde_json::Value::Bool(b) => Value::Bool(b),
            serde_json::Value::Number(n) => {
                n.as_i64().map(Value::Int).unwrap_or_else(|| Value::Float(n.as_f64().unwrap_or(f64::NAN)))
            }
            serde_json::Value::String(s) => Value::Text(s),
            serde_json::Value::Array(items) => Value::List(items.into_iter().map(Value::from).collect()),
            serde_json::Value::Object(map) => Value::Struct(map.into_iter().map(|(k, v)| (k, v.into())).collect()),
        }
    }
}

macro_rules! value_from {
    ($($from:ty => |$x:ident| $to:expr),* $(,)?) => {$(
        impl From<$from> for Value {
            fn from($x: $from) -> Self {
                $to
            }
        }
    )*};
}
value_from! {
    bool => |x| Value::Bool(x),
    i32 => |x| Value::Int(x.into()),
    i64 => |x| Value::Int(x),
    u32 => |x| Value::Int(x.into()),
    usize => |x| i64::try_from(x).map_or(Value::Float(x as f64), Value::Int),
    f32 => |x| Value::Float(x.into()),
    f64 => |x| Value::Float(x),
    &str => |x| Value::Text(x.into()),
    &String => |x| Value::Text(x.clone()),
    String => |x| Value::Text(x),
}

impl<T: Into<Value>> From<Vec<T>> for Value {
    fn from(items: Vec<T>) -> Self {
        Value::List(items.into_iter().map(Into::into).collect())
    }
}

impl<T: Into<Value>> From<Option<T>> for Value {
    fn from(value: Option<T>) -> Self {
        value.map_or(Value::Null, Into::into)
    }
}

/// Reads one cell. Types without a `Value` of their own (dates, binary, ...) come as text.
pub(super) fn read(array: &dyn Array, i: usize) -> Value {
    if array.is_null(i) {
        return Value::Null;
    }
    match array.data_type() {
        DataType::Null => Value::Null,
        DataType::Boolean => Value::Bool(array.as_boolean().value(i)),
        DataType::Utf8 => Value::Text(array.as_string::<i32>().value(i).into()),
        DataType::LargeUtf8 => Value::Text(array.as_string::<i64>().value(i).into()),
        DataType::Int64 => Value::Int(array.as_primitive::<Int64Type>().value(i)),
        DataType::Float64 => Value::Float(array.as_primitive::<Float64Type>().value(i)),
        DataType::UInt64 => {
            let x = array.as_primitive::<UInt64Type>().value(i);
            i64::try_from(x).map_or(Value::Float(x as f64), Value::Int)
        }
        t if t.is_integer() || t.is_floating() => {
            let widest = if t.is_integer() { DataType::Int64 } else { DataType::Float64 };
            cast(&array.slice(i, 1), &widest).map_or_else(|_| as_text(array, i), |x| read(&x, 0))
        }
        DataType::Struct(fields) => {
            let columns = array.as_struct().columns();
            Value::Struct(fields.iter().zip(columns).map(|(f, c)| (f.name().clone(), read(c, i))).collect())
        }
        _ => match items(array, i) {
            Some(items) => Value::List((0..items.len()).map(|i| read(&items, i)).collect()),
            None => as_text(array, i),
        },
    }
}

/// The items of cell `i`, if this is a column of lists.
pub(super) fn items(array: &dyn Array, i: usize) -> Option<ArrayRef> {
    Some(match array.data_type() {
        DataType::List(_) => array.as_list::<i32>().value(i),
        DataType::LargeList(_) => array.as_list::<i64>().value(i),
        DataType::FixedSizeList(..) => array.as_fixed_size_list().value(i),
        _ => return None,
    })
}

fn as_text(array: &dyn Array, i: usize) -> Value {
    array_value_to_string(array, i).map_or(Value::Null, Value::Text)
}

/// The Arrow type that holds both what `so_far` holds and `value`; `Err` names the two types
/// that do not go together. Integers widen to floats, null goes with everything.
pub(super) fn unify(so_far: &DataType, value: &Value) -> Result<DataType, String> {
    unify_types(so_far, &type_of(value)?)
}

fn type_of(value: &Value) -> Result<DataType, String> {
    Ok(match value {
        Value::Null => DataType::Null,
        Value::Bool(_) => DataType::Boolean,
        Value::Int(_) => DataType::Int64,
        Value::Float(_) => DataType::Float64,
        Value::Text(_) => DataType::Utf8,
        Value::List(items) => list_of(items.iter().try_fold(DataType::Null, |so_far, item| unify(&so_far, item))?),
        Value::Struct(fields) => {
            let field = |(name, value): &(String, Value)| Ok(Field::new(name, type_of(value)?, true));
            DataType::Struct(fields.iter().map(field).collect::<Result<Fields, String>>()?)
        }
    })
}

fn unify_types(a: &DataType, b: &DataType) -> Result<DataType, String> {
    Ok(match (a, b) {
        (a, b) if a == b => a.clone(),
        (DataType::Null, other) | (other, DataType::Null) => other.clone(),
        (DataType::Int64, DataType::Float64) | (DataType::Float64, DataType::Int64) => DataType::Float64,
        (DataType::List(a), DataType::List(b)) => list_of(unify_types(a.data_type(), b.data_type())?),
        (DataType::Struct(a), DataType::Struct(b)) => {
            let mut fields: Vec<Field> = a.iter().map(|f| f.as_ref().clone()).collect();
            for theirs in b {
                match fields.iter_mut().find(|f| f.name() == theirs.name()) {
                    Some(f) => *f = Field::new(f.name(), unify_types(f.data_type(), theirs.data_type())?, true),
                    None => fields.push(theirs.as_ref().clone()),
                }
            }
            DataType::Struct(fields.into())
        }
        (a, b) => return Err(format!("{} where the rows above have {}", type_name(b), type_name(a))),
    })
}

fn list_of(item: DataType) -> DataType {
    DataType::List(Arc::new(Field::new("item", item, true)))
}

/// A column of `dtype`, which must be what `unify` made of all of `values`.
pub(super) fn build(dtype: &DataType, values: &[&Value]) -> ArrayRef {
    match dtype {
        DataType::Boolean => Arc::new(values.iter().map(|v| v.as_bool()).collect::<BooleanArray>()),
        DataType::Int64 => Arc::new(values.iter().map(|v| v.as_int()).collect::<Int64Array>()),
        DataType::Float64 => Arc::new(values.iter().map(|v| v.as_float()).collect::<Float64Array>()),
        DataType::Utf8 => Arc::new(values.iter().map(|v| v.as_text()).collect::<StringArray>()),
        DataType::List(field) => {
            let offsets = OffsetBuffer::from_lengths(values.iter().map(|v| v.as_list().len()));
            let flat: Vec<&Value> = values.iter().flat_map(|v| v.as_list()).collect();
            Arc::new(ListArray::new(field.clone(), offsets, build(field.data_type(), &flat), not_null(values)))
        }
        DataType::Struct(fields) => {
            let column = |field: &Arc<Field>| {
                let column: Vec<&Value> = values.iter().map(|v| v.field(field.name())).collect();
                build(field.data_type(), &column)
            };
            let columns = fields.iter().map(column).collect();
            match StructArray::try_new_with_length(fields.clone(), columns, not_null(values), values.len()) {
                Ok(array) => Arc::new(array),
                Err(_) => Arc::new(NullArray::new(values.len())),
            }
        }
        _ => Arc::new(NullArray::new(values.len())),
    }
}

fn not_null(values: &[&Value]) -> Option<NullBuffer> {
    values.contains(&&Value::Null).then(|| values.iter().map(|v| **v != Value::Null).collect())
}

/// A type's name as `datasets` writes it: `string`, `int64`, `List(int32)`, ...
pub(super) fn type_name(dtype: &DataType) -> String {
    nested_name(dtype, &|plain| match plain {
        DataType::Utf8 => "string".into(),
        DataType::LargeUtf8 => "large_string".into(),
        DataType::Boolean => "bool".into(),
        other => other.to_string().to_lowercase(),
    })
}

/// The name of a type, where `plain` names what is neither a list nor a struct.
pub(super) fn nested_name(dtype: &DataType, plain: &dyn Fn(&DataType) -> String) -> String {
    let of = |field: &Field| nested_name(field.data_type(), plain);
    match dtype {
        DataType::List(f) => format!("List({})", of(f)),
        DataType::LargeList(f) => format!("LargeList({})", of(f)),
        DataType::FixedSizeList(f, n) => format!("List({}, length={n})", of(f)),
        DataType::Struct(fields) => py_dict(fields.iter().map(|f| (f.name(), of(f)))),
        other => plain(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_print_as_python_prints_them() {
        let value = Value::Struct(vec![
            ("a".into(), "it's\n\"x\"".into()),
            ("b".into(), "it's".into()),
            ("c".into(), vec![1i64, 2].into()),
            ("d".into(), Value::from(vec![Value::Null, Value::Bool(true), Value::Float(1.0)])),
        ]);
        assert_eq!(value.to_string(), r#"{'a': 'it\'s\n"x"', 'b': "it's", 'c': [1, 2], 'd': [None, True, 1.0]}"#);
    }

    #[test]
    fn a_column_reads_back_as_it_was_built() {
        let rows = [
            Value::Struct(vec![("role".into(), "user".into()), ("n".into(), Value::Null)]),
            Value::Null,
            Value::Struct(vec![("role".into(), "bot".into()), ("n".into(), vec![1.5f64].into())]),
        ];
        let dtype = rows.iter().try_fold(DataType::Null, |so_far, row| unify(&so_far, row)).unwrap();
        let array = build(&dtype, &rows.iter().collect::<Vec<_>>());
        for (i, row) in rows.iter().enumerate() {
            assert_eq!(&read(&array, i), row);
        }
        assert_eq!(type_name(&dtype), "{'role': string, 'n': List(float64)}");
    }

    #[test]
    fn types_that_do_not_go_together_are_named() {
        assert_eq!(unify(&DataType::Int64, &"x".into()).unwrap_err(), "string where the rows above have int64");
    }
}
