//! Safetensors files, written tensor by tensor: nothing of the file's size exists in memory beside them.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
};

use candle_core::{Device, Tensor};
use safetensors::{
    View,
    tensor::{Metadata, TensorInfo},
};

use crate::{
    error::{Error, Result},
    safe_file::replace,
};

/// Writes a file of tensors in place of what is at `path`, with the metadata that PyTorch's programs expect; the bytes
/// are those of `safetensors.torch.save_file`. `before_each` tensor may stop it: what was there stays.
pub fn save_tensors(path: &Path, tensors: Vec<(String, Tensor)>, before_each: &dyn Fn() -> Result<()>) -> Result<()> {
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    replace(path, |temporary| write_tensors(temporary, tensors, Some(metadata), before_each))
}

/// Writes a file of tensors in a folder that [`replace`] fills.
pub fn write_tensors(
    path: &Path,
    mut tensors: Vec<(String, Tensor)>,
    metadata: Option<HashMap<String, String>>,
    before_each: &dyn Fn() -> Result<()>,
) -> Result<()> {
    let failed = |e| Error::io("write", path)(e);
    // The order of the safetensors library: the widest numbers first, so that all are aligned, then by name.
    tensors.sort_by(|(a, x), (b, y)| View::dtype(y).cmp(&View::dtype(x)).then(a.cmp(b)));
    let mut end = 0;
    let info = |(name, tensor): &(String, Tensor)| {
        let begin = end;
        end += tensor.data_len();
        let (dtype, shape) = (View::dtype(tensor), tensor.dims().to_vec());
        (name.clone(), TensorInfo { dtype, shape, data_offsets: (begin, end) })
    };
    let infos = tensors.iter().map(info).collect();
    let header = Metadata::new(metadata, infos).map_err(io::Error::other).and_then(|m| Ok(serde_json::to_vec(&m)?));
    let mut header = header.map_err(failed)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::new(File::create(path).map_err(failed)?);
    file.write_all(&(header.len() as u64).to_le_bytes()).and_then(|()| file.write_all(&header)).map_err(failed)?;
    for (_, tensor) in &tensors {
        before_each()?;
        file.write_all(&tensor.to_device(&Device::Cpu)?.data()).map_err(failed)?;
    }
    file.flush().map_err(failed)
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    #[test]
    fn the_bytes_are_those_of_the_library() {
        let dir = tempfile::tempdir().unwrap();
        let tensor = |n: usize, dtype| Tensor::arange(0f32, n as f32, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        let tensors: Vec<(String, Tensor)> =
            [("b", 3, DType::U8), ("a", 5, DType::F16), ("c", 2, DType::F32), ("0", 4, DType::F16)]
                .map(|(name, n, dtype)| (name.to_string(), tensor(n, dtype)))
                .into();
        let metadata = Some(HashMap::from([("format".to_string(), "pt".to_string())]));
        let expected = safetensors::serialize(tensors.clone(), metadata).unwrap();
        let path = dir.path().join("a.safetensors");
        save_tensors(&path, tensors.clone(), &|| Ok(())).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), expected);
        let half = save_tensors(&path, tensors, &|| Err(Error::Interrupted { what: "a test".into() }));
        assert!(matches!(half, Err(Error::Interrupted { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), expected, "what was there stays");
    }
}
