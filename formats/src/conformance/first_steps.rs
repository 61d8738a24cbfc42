//! What any format should manage before anything else, as a test of one's own format can call it.

use std::error::Error;
use std::path::Path;
use std::{fs, io};

use crate::{Buffer, Disk, Engine, Format, Image, Ring, Segments};

/// Size of the disk at first, and what it is made larger to.
const SIZE: u64 = 1 << 20;
/// One request's length, and where it lies.
const LEN: usize = 4096;
const OFFSET: u64 = 64 << 10;

/// Creates an image in `folder`, of the format of that name with its default options, writes, zeroes, discards
/// and enlarges it, and opens it again: what was written is there, all else reads as zeroes. Where it says
/// that nothing is [volatile](Disk::volatile), and after a flush, that is also so if its process is killed.
///
/// # Errors
///
/// The format is not registered, an operation fails, or what is read is not what it should be.
pub fn first_steps(name: &str, folder: &Path) -> Result<(), Box<dyn Error>> {
    let format = crate::find(name).ok_or_else(|| format!("no format `{name}`"))?;
    let image = Image {
        size: Some(SIZE),
        ..Image::new(folder.join("disk"))
    };
    let ring = Ring::new(Engine::Auto)?;
    let first = async {
        let disk = (format.open)(&ring, &image).await?;
        is("the size", disk.size(), SIZE)?;
        for offset in [OFFSET, 2 * OFFSET, 3 * OFFSET] {
            disk.write(offset, filled(7)?).await?;
        }
        if !disk.volatile() {
            killed(
                format,
                &ring,
                &image,
                "the data of a process that was killed",
            )
            .await?;
        }
        disk.flush().await?;
        killed(format, &ring, &image, "what was flushed and then killed").await?;
        disk.write(OFFSET, filled(7)?).await?;
        if !disk.volatile() {
            killed(
                format,
                &ring,
                &image,
                "what was written again and then killed",
            )
            .await?;
        }
        disk.write_zeroes(2 * OFFSET, LEN as u64, true).await?;
        let limits = disk.limits();
        if limits.discard_granularity != 0 {
            disk.discard(3 * OFFSET, LEN as u64).await?;
        }
        if limits.resize {
            disk.resize(2 * SIZE).await?;
            is("the new size", disk.size(), 2 * SIZE)?;
        }
        disk.flush().await?;
        disk.close().await?;
        Ok::<_, Box<dyn Error>>(limits.resize)
    };
    let larger = ring.block_on(first, || {})?;
    let ro = Image {
        ro: true,
        size: None,
        ..image.clone()
    };
    let again = async {
        let disk = (format.open)(&ring, &ro).await?;
        is("the size after", disk.size(), SIZE << u32::from(larger))?;
        for (offset, byte) in [
            (0, 0),
            (OFFSET, 7),
            (2 * OFFSET, 0),
            (disk.size() - LEN as u64, 0),
        ] {
            let bytes = read(&*disk, offset).await?;
            is(&format!("the data at {offset}"), bytes, vec![byte; LEN])?;
        }
        disk.close().await?;
        Ok(())
    };
    ring.block_on(again, || {})
}

/// Opens a copy of the image as it is now, as if the process that has it open were killed, and looks
/// at what was written.
async fn killed(
    format: &Format,
    ring: &Ring,
    image: &Image,
    what: &str,
) -> Result<(), Box<dyn Error>> {
    let path = image.path.with_extension("killed");
    fs::copy(&image.path, &path)?;
    let copy = Image {
        ro: true,
        size: None,
        ..Image::new(&path)
    };
    let disk = (format.open)(ring, &copy).await?;
    for offset in [OFFSET, 2 * OFFSET, 3 * OFFSET] {
        is(what, read(&*disk, offset).await?, vec![7; LEN])?;
    }
    disk.close().await?;
    fs::remove_file(path)?;
    Ok(())
}

fn filled(byte: u8) -> io::Result<Segments> {
    let segments = Segments::from_buffer(Buffer::zeroed(LEN, LEN)?);
    segments.copy_from(&[byte; LEN]);
    Ok(segments)
}

async fn read(disk: &dyn Disk, offset: u64) -> io::Result<Vec<u8>> {
    let segments = filled(1)?;
    disk.read(offset, segments.clone()).await?;
    let mut bytes = vec![0; LEN];
    segments.copy_to(&mut bytes);
    Ok(bytes)
}

fn is<T: PartialEq + std::fmt::Debug>(what: &str, found: T, expected: T) -> Result<(), String> {
    match found == expected {
        true => Ok(()),
        false => Err(format!("{what} is {found:?}, expected {expected:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_formats_of_this_crate_take_the_first_steps() {
        for format in crate::formats().unwrap() {
            let folder = tempfile::tempdir().unwrap();
            first_steps(format.name, folder.path())
                .unwrap_or_else(|error| panic!("{}: {error}", format.name));
        }
    }

    #[test]
    fn a_format_that_is_not_there_is_an_error() {
        let error = first_steps("nonesuch", Path::new("/")).unwrap_err();
        assert_eq!(error.to_string(), "no format `nonesuch`");
    }
}
