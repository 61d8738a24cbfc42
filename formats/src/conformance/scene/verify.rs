//! Whether an image is what it is to be, as QEMU sees it.

use std::fs;
use std::io::Read;

use super::super::content::SECTOR;
use super::super::point::DataFile;
use super::super::qemu;
use super::{DATA, Scene, TOP, stamp};

impl Scene {
    /// Compares everything with what it is to hold, as QEMU sees it.
    pub fn verify(&mut self) -> Result<(), String> {
        let (found, said) = qemu::check(&self.directory, TOP)?;
        if found != qemu::Found::NOTHING {
            return Err(format!("qemu-img check: {said}"));
        }
        let full = |line: &&str| line.contains("% allocated");
        if let Some(line) = said.lines().find(full)
            && !self.point.sparse
            && !line.contains("100.00% allocated")
        {
            return Err(format!("`sparse` is false, but: {line}"));
        }
        self.compare()?;
        for (name, content) in &self.snapshots {
            qemu::img(
                &self.directory,
                &format!("convert -f qcow2 -l snapshot.name={name} -O raw {TOP} snapshot"),
            )?;
            let path = self.directory.join("snapshot");
            let (_, len) = stamp(&path)?;
            let window = 0..content.size.min(len);
            content
                .compare_raw(&path, window)
                .map_err(|error| format!("snapshot {name}: {error}"))?;
        }
        if self.point.data_file == DataFile::Raw && !self.point.huge {
            let path = self.directory.join(DATA);
            self.content.compare_raw(&path, 0..self.content.size)?;
        }
        self.below_is_untouched()
    }

    /// Whether nobody wrote to what lies below the image.
    pub(in super::super) fn below_is_untouched(&self) -> Result<(), String> {
        for (path, modified, len) in &self.quiet {
            if stamp(path)? != (*modified, *len) {
                return Err(format!("{} was written to", path.display()));
            }
        }
        Ok(())
    }

    fn compare(&self) -> Result<(), String> {
        if self.point.huge {
            return self.compare_windows();
        }
        let model = self.directory.join("model");
        let written = self.content.write_raw(&model);
        written.map_err(|error| format!("{}: {error}", model.display()))?;
        let compare = format!("compare -f qcow2 -F raw {TOP} model");
        let said = qemu::img(&self.directory, &compare)?;
        match said.contains("mismatch") {
            true => Err(format!("qemu-img compare: {said}")),
            false => Ok(()),
        }
    }

    /// Compares the places where something may have been written.
    fn compare_windows(&self) -> Result<(), String> {
        const BLOCK: u64 = 64 << 10;
        let size = self.content.size;
        let mut end = 0;
        for sector in self.content.sectors.keys() {
            let start = sector * SECTOR / BLOCK * BLOCK;
            if start < end {
                continue;
            }
            end = (start + (8 << 20)).min(size);
            let (skip, count) = (start / BLOCK, end.div_ceil(BLOCK));
            let dd = format!("dd -f qcow2 -O raw bs={BLOCK} skip={skip} count={count}");
            qemu::img(&self.directory, &format!("{dd} if={TOP} of=window"))?;
            self.content
                .compare_raw(&self.directory.join("window"), start..end)?;
        }
        Ok(())
    }

    /// The first bytes of the image without what an engine may change in them: its size and the
    /// places of its tables.
    pub(in super::super) fn header(&self) -> Result<Vec<u8>, String> {
        let failed = |error: std::io::Error| error.to_string();
        let mut bytes = Vec::new();
        let file = fs::File::open(&self.image.path).map_err(failed)?;
        let most = self.point.cluster_size.min(4096);
        file.take(most).read_to_end(&mut bytes).map_err(failed)?;
        // size, l1_size and l1_table_offset, refcount_table_offset and refcount_table_clusters
        for range in [24..32, 36..60] {
            bytes
                .get_mut(range)
                .ok_or("the image is shorter than a header")?
                .fill(0);
        }
        Ok(bytes)
    }
}
